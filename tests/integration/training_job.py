"""Losses and gradients of one job, by plain transformers and through remote blocks."""

import torch

from tests.integration.conftest import HIDDEN, NUM_BLOCKS

COUNT = 4
"""Tokens of a deep prompt."""


def make_batch(rows=6, columns=40, seed=0):
    """Rows of different lengths, padded on the right; enough tokens for several micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (rows, columns), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, columns - 3 * row :] = 0
    mask[0] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def make_prompts():
    return torch.randn(NUM_BLOCKS, COUNT, HIDDEN, generator=torch.Generator().manual_seed(1)) / 4


def local_loss(model, batch, prompts):
    """The loss with prompts at every block, by plain transformers."""

    def enter(index):
        def add(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = torch.cat([hidden[:, :COUNT] + prompts[index], hidden[:, COUNT:]], 1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return add

    hooks = [
        layer.register_forward_pre_hook(enter(index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        return model(**batch).loss
    finally:
        for hook in hooks:
            hook.remove()


def remote_loss(model, batch, prompts):
    """The same, with the blocks elsewhere and the rest here."""
    hidden = model.get_input_embeddings()(batch["input_ids"])
    hidden = model.blocks(hidden, attention_mask=batch["attention_mask"], prompts=prompts)
    logits = model.lm_head(model.model.norm(hidden))
    return model.loss_function(logits, batch["labels"], vocab_size=model.config.vocab_size)


def local_gradients(local_model, batch):
    """Loss, gradients of the embeddings, gradients of the prompts."""
    local_model.requires_grad_(False)
    prompts, weight = make_prompts().requires_grad_(), local_model.get_input_embeddings().weight
    weight.requires_grad_()
    loss = local_loss(local_model, batch, prompts)
    found = torch.autograd.grad(loss, [weight, prompts])
    local_model.requires_grad_(False)
    return [loss.detach(), *found]


def remote_gradients(model, batch, between=lambda: None):
    prompts, weight = make_prompts().requires_grad_(), model.get_input_embeddings().weight
    weight.requires_grad_()
    loss = remote_loss(model, batch, prompts)
    between()
    found = torch.autograd.grad(loss, [weight, prompts])
    weight.requires_grad_(False)
    return [loss.detach(), *found]


def assert_near(found, expected):
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).abs().max() <= 1e-4 * right.abs().max()


def training_of(model):
    remote = model.blocks
    return remote._remote.trained(remote.blocks).training.remote
