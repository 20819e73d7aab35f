"""`python -m swarm.client train --data chats.jsonl --method lora --output my-adapter`: fine-tune through the swarm.

    --data ─► train_data: rows, checked, split ─┐
    --method ─► PEFT's config ─► get_peft_model ─┴─► trl's SFTTrainer ─► checkpoints, adapter
                                                        └─ train_log: progress, log.csv, loss.png, Ctrl-C

The loop, the schedule, packing, checkpoints and how they are resumed are transformers' and trl's own. Exit status: 0
done, 2 an error (one line on stderr), 130 interrupted (what was learnt is saved).
"""

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm import logs
from swarm.checkpoint.source import DEFAULT_MODEL
from swarm.command import INTERRUPTED, exit_status, program
from swarm.errors import ConfigError, InvalidRequest
from swarm.options import MODEL, add_checkpoint, add_initial_peers, add_threads, require_at_least
from swarm.private.arguments import add_credentials, load_credentials, require_peers

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerCallback

    from swarm.client.cache import BlockService
    from swarm.client.peft_model import DistributedPeftModel

METHODS = ("lora", "ia3", "prompt", "prefix")
UNTIL_THE_END = -1
"""Of --max-steps: as many as the epochs take."""
_PACKED = ("lora", "ia3")
"""Methods without virtual positions, which stand before a row and not before each sequence in it."""


def main(argv: Sequence[str] | None = None, *, block_service: "BlockService | None" = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: what comes behind `train`.
        block_service: use these blocks instead of a swarm's.
    """
    args = build_parser().parse_args(argv)
    logs.configure(args)
    return exit_status(lambda: _run(args, block_service))


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog=f"{program('client')} train",
        description="Fine-tune a model whose transformer blocks run on the servers of a swarm; the adapter stays here.",
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DATA",
        help="JSONL, JSON, CSV or Parquet file, or the name of a data set; rows have messages, prompt and completion,"
             " or text")  # fmt: skip
    add("--split", default="train", help="of a named data set (default: %(default)s)")
    add("--output", required=True, metavar="DIR", help="where the adapter, its checkpoints, log.csv and loss.png go")
    add("--model", default=DEFAULT_MODEL, help=MODEL)
    add_initial_peers(parser)
    add_credentials(parser)
    add("--method", choices=METHODS, default="lora", help="what is trained (default: %(default)s)")
    add("--rank", type=int, default=8, metavar="R", help="of lora (default: %(default)s)")
    add("--alpha", type=float, metavar="A", help="of lora (default: twice the rank)")
    add("--target-modules", nargs="+", metavar="NAME", help="linears that lora changes (default: all-linear)")
    add("--virtual-tokens", type=int, default=16, metavar="N", help="of prompt and prefix (default: %(default)s)")
    add("--epochs", type=float, default=1.0, help="times through the data (default: %(default)s)")
    add(
        "--max-steps",
        type=int,
        default=UNTIL_THE_END,
        metavar="N",
        help="steps to take (default: all of the epochs)",
    )
    add("--batch-size", type=int, default=4, metavar="N", help="rows of a micro-batch (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches of a step (default: %(default)s)")
    add("--max-length", type=int, default=512, metavar="N", help="tokens of a row, the rest is cut (default: 512)")
    add(
        "--packing",
        action="store_true",
        help="put several short rows into one; they don't see each other; with lora or ia3",
    )
    add("--streaming", action="store_true", help="read the data as it is used; needs --max-steps")
    add("--learning-rate", type=float, metavar="X", help="default: 2e-4 for lora, 5e-3 for the others")
    add("--schedule", choices=("linear", "cosine", "constant"), default="cosine", help="default: %(default)s")
    add("--warmup-steps", type=int, default=0, metavar="N", help="of the learning rate (default: %(default)s)")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradients (default: %(default)s)")
    add("--eval-rows", type=int, default=0, metavar="N", help="rows kept back to evaluate on (default: %(default)s)")
    add("--eval-steps", type=int, default=50, metavar="N", help="steps between evaluations (default: %(default)s)")
    add("--save-steps", type=int, default=50, metavar="N", help="steps between checkpoints (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--federated", metavar="NAME", help="train with all clients of a run of this name, each with its own data")
    add("--rounds", type=int, default=10, metavar="N", help="of a federated run (default: %(default)s)")
    add("--local-steps", type=int, default=20, metavar="K", help="steps between rounds (default: %(default)s)")
    add("--min-clients", type=int, default=2, metavar="N", help="fewer make no round (default: %(default)s)")
    add("--round-timeout", type=float, default=600.0, metavar="S", help="longest wait for others (default: 600 s)")
    add("--host", default="0.0.0.0", help="address to listen on for them (default: %(default)s)")
    add("--port", type=int, default=0, help="TCP port for them; 0 is any (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the parameters and the order (default: %(default)s)")
    add_checkpoint(parser)
    add_threads(parser)
    logs.add_arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded."""
    sizes = ("rank", "virtual_tokens", "batch_size", "accumulate", "max_length", "eval_steps", "save_steps", "threads")
    require_at_least(args, 1, *sizes)
    require_at_least(args, 0, "eval_rows", "warmup_steps")
    if args.max_steps != UNTIL_THE_END:
        require_at_least(args, 1, "max_steps")
    for name in ("epochs", "clip", "learning_rate", "alpha"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InvalidRequest(f"--{name.replace('_', '-')} is {value}, need more than 0")
    if args.packing and args.method not in _PACKED:
        raise InvalidRequest(f"--packing can't be had with --method {args.method}, only with {' and '.join(_PACKED)}")
    if args.federated is not None:
        _check_federated(args)
    if args.streaming and args.max_steps < 1:
        raise InvalidRequest("--streaming needs --max-steps: nobody knows how long the data is")
    if args.resume != bool(last_checkpoint(Path(args.output))):
        raise InvalidRequest(
            f"--output {args.output} has no checkpoint to resume from"
            if args.resume
            else f"--output {args.output} has checkpoints: add --resume to go on, or choose another"
        )


def _check_federated(args: argparse.Namespace) -> None:
    """Rounds end training, and what others have can't be resumed from a file."""
    require_at_least(args, 1, "rounds", "local_steps", "min_clients")
    if args.method != "lora":
        raise InvalidRequest(f"--federated can't be had with --method {args.method}, only with lora")
    if args.resume:
        raise InvalidRequest("--federated takes no --resume: a client that begins anew gets what the others have")
    if args.max_steps != UNTIL_THE_END:
        raise InvalidRequest(f"--federated takes --rounds and --local-steps, not --max-steps {args.max_steps}")
    args.max_steps = args.rounds * args.local_steps


def last_checkpoint(output: Path) -> Path | None:
    """The latest of the checkpoints that a run has left."""
    numbered = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return max(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _run(args: argparse.Namespace, block_service: "BlockService | None") -> int:
    _check(args)
    credentials = load_credentials(args)
    initial_peers = require_peers(args, credentials) if block_service is None else ()
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"training needs the package {error.name}: pip install 'swarm-llm[train]'") from error
    import torch
    from transformers.utils import logging as transformers_logging

    from swarm.client.auto import AutoDistributedModelForCausalLM
    from swarm.client.chat import load_tokenizer
    from swarm.client.peft_model import get_peft_model
    from swarm.client.train_data import load_rows

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    train_rows, eval_rows = load_rows(
        args.data, split=args.split, num_eval=args.eval_rows, streaming=args.streaming, seed=args.seed,
        cache_dir=args.cache_dir and str(Path(args.cache_dir) / "datasets"),
    )  # fmt: skip
    base = AutoDistributedModelForCausalLM.from_pretrained(
        args.model, initial_peers=initial_peers, credentials=credentials, block_service=block_service, dtype="float32",
        revision=args.revision, cache_dir=args.cache_dir,
    )  # fmt: skip
    try:
        torch.manual_seed(args.seed)
        model = get_peft_model(base, peft_config(args))
        return _train(args, model, load_tokenizer(base.checkpoint), train_rows, eval_rows)
    finally:
        if block_service is None:
            base.close()


def peft_config(args: argparse.Namespace) -> Any:
    """PEFT's config for the method."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if args.method == "lora":
        return LoraConfig(
            r=args.rank, lora_alpha=args.alpha or 2 * args.rank, target_modules=args.target_modules or "all-linear",
            **task,
        )  # fmt: skip
    if args.method == "ia3":
        return IA3Config(target_modules=args.target_modules, **task)
    kind = PromptTuningConfig if args.method == "prompt" else PrefixTuningConfig
    return kind(num_virtual_tokens=args.virtual_tokens, **task)


def _train(
    args: argparse.Namespace, model: "DistributedPeftModel", tokenizer: Any, train_rows: Any, eval_rows: Any
) -> int:
    if args.federated is None:
        return _train_with(args, model, tokenizer, train_rows, eval_rows, [])
    from swarm.client.federated_rounds import FederatedRounds, open_run

    per_round = args.local_steps * args.batch_size * args.accumulate
    with open_run(args, model) as run:
        num_examples = per_round if args.streaming else len(train_rows)
        rounds = FederatedRounds(run, local_steps=args.local_steps, num_examples=num_examples)
        return _train_with(args, model, tokenizer, train_rows, eval_rows, [rounds])


def _train_with(
    args: argparse.Namespace,
    model: "DistributedPeftModel",
    tokenizer: Any,
    train_rows: Any,
    eval_rows: Any,
    callbacks: Sequence["TrainerCallback"],
) -> int:
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    from swarm.client.train_log import RunLog

    log = RunLog(Path(args.output), model, is_resumed=args.resume)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers about arguments that trl still names as before
        settings = _settings(args, has_eval=eval_rows is not None)
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        callbacks=[*callbacks, log],
    )
    trainer.remove_callback(PrinterCallback)
    with log:
        trainer.train(resume_from_checkpoint=str(last_checkpoint(Path(args.output))) if args.resume else None)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    state = "interrupted, saved" if log.is_interrupted else "saved"
    print(f"{state}: {args.output} after {trainer.state.global_step} steps", file=sys.stderr)
    return INTERRUPTED if log.is_interrupted else 0


def _settings(args: argparse.Namespace, *, has_eval: bool) -> Any:
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate or (2e-4 if args.method == "lora" else 5e-3),
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup_steps,
        max_grad_norm=args.clip,
        max_length=args.max_length,
        packing=args.packing,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=args.eval_steps if has_eval else None,
        save_strategy="steps",
        save_steps=args.save_steps,
        logging_steps=1,
        report_to=_reporters(),
        disable_tqdm=True,
        seed=args.seed,
        use_cpu=True,  # the local part; the blocks are wherever their servers have them
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )


def _reporters() -> list[str]:
    """TensorBoard, where it is installed."""
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
