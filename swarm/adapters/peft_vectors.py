"""PEFT's methods that train vectors alone: IA3 (factors) and BEFT (biases that are added).

    IA3    ia3_l [out, 1]: o          ia3_l [1, in], of modules that are called feedforward: i
    BEFT   beft_bias [1, out]: b

LoRA with bias="all" and no more, the other way to BitFit, is read in `peft_lora`.
"""

from swarm.adapters.delta import LinearDelta
from swarm.adapters.layout import ModelLayout
from swarm.adapters.peft_files import PeftFiles
from swarm.adapters.peft_linears import LinearParts, linears_of
from swarm.adapters.peft_lora import Deltas, gathered
from swarm.errors import AdapterError

_OF_TRAINING = frozenset({"target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_weights",
                          "init_ia3_weights"})  # fmt: skip


def read_ia3(files: PeftFiles, layout: ModelLayout) -> Deltas:
    """IA3.

    Raises:
        AdapterError: malformed, for another base, or with an option that servers can't honour.
    """
    files.refuse_other_options(_OF_TRAINING)
    return gathered((parts, _ia3_linear(parts)) for parts in linears_of(files, layout, {".ia3_l": "ia3_l"}))


def read_beft(files: PeftFiles, layout: ModelLayout) -> Deltas:
    """BEFT.

    Raises:
        AdapterError: malformed, for another base, or with an option that servers can't honour.
    """
    files.refuse_other_options(_OF_TRAINING)
    found = linears_of(files, layout, {".beft_bias": "beft_bias"})
    return gathered(
        (parts, LinearDelta(bias_O=parts.read("beft_bias", (1, parts.shape.num_outputs))[0])) for parts in found
    )


def _ia3_linear(parts: LinearParts) -> LinearDelta:
    on_outputs, on_inputs = (parts.shape.num_outputs, 1), (1, parts.shape.num_inputs)
    shape = parts.shape_of("ia3_l")
    if shape == on_outputs:
        return LinearDelta(output_scale_O=parts.read("ia3_l", on_outputs)[:, 0])
    if shape == on_inputs:
        return LinearDelta(input_scale_I=parts.read("ia3_l", on_inputs)[0])
    raise AdapterError(f"IA3 adapter: {parts.name} has shape {shape}, expected {on_outputs} or {on_inputs}")
