"""A span of a tiny model with adapters, and sequences that run through it together."""

import torch

from swarm.adapters.format import decode_shard
from swarm.adapters.peft import read_adapter
from swarm.checkpoint.layout import model_layout
from swarm.server.blocks import BlockSpan, Chunk
from swarm.server.pages import PageAllocator, PageTable
from swarm.types import BlockRange
from tests.families.configs import FAMILIES
from tests.families.harness import SavedCheckpoint
from tests.server.blocks.peft_adapters import run_peft, save_adapter

NUM_PAGES = 512
TOLERANCE = 1e-4
LENGTHS = (37, 5, 22, 18, 1, 9)


class Server:
    """A span of all blocks of a tiny model, some adapters in pages and some in memory of their own."""

    def __init__(self, name, directory, **options):
        model = FAMILIES[name].model()
        model.save_pretrained(directory)
        checkpoint = SavedCheckpoint(directory)
        self.config = checkpoint.config()
        self.num_blocks = self.config.get_text_config(decoder=True).num_hidden_layers
        self.span = BlockSpan.load(checkpoint, BlockRange(0, self.num_blocks), num_pages=NUM_PAGES, **options)
        self.allocator = PageAllocator(NUM_PAGES)

    def attach(self, directory, *, paged):
        """Through our reader and the bytes that cross the network -> (handle, virtual positions)."""
        if directory is None:
            return -1, 0
        loaded = read_adapter(directory, layout=model_layout(self.config))
        num_virtual = loaded.manifest.num_virtual
        deltas = {
            info.block: decode_shard(loaded.shards[info.block], info, self.span.shape(info.block), num_virtual)
            for info in loaded.manifest.shards
        }
        pages = [] if paged else None
        while paged and (missing := self.span.adapter_pages(deltas, pages)):
            pages += self.allocator.allocate(missing, after=pages[-1] if pages else None)
        return self.span.attach(deltas, pages), num_virtual

    def run(self, sequences, *, chunk=7):
        """All sequences together: prefill in chunks of several lengths beside decode rows -> outputs of each.

        Args:
            sequences: (hidden states, handle) of each.
        """
        tables = [PageTable(self.allocator) for _ in sequences]
        states = [self.span.new_state() for _ in sequences]
        outputs = [[] for _ in sequences]
        positions = [0] * len(sequences)
        while any(position < len(rows) for position, (rows, _) in zip(positions, sequences, strict=True)):
            batch, who = [], []
            for index, (rows, handle) in enumerate(sequences):
                left = len(rows) - positions[index]
                if left:
                    count = 1 if left <= 3 else min(chunk + index, left - 3)  # the last tokens one by one
                    part = rows[positions[index] : positions[index] + count]
                    self.span.copy_pages(tables[index].grow(positions[index] + count))
                    batch.append(Chunk(hidden_states=part, position=positions[index], pages=list(tables[index].pages),
                                       entry=0, exit=self.num_blocks, state=states[index],
                                       adapter=handle))  # fmt: skip
                    who.append(index)
            for index, output in zip(who, self.span.run(batch), strict=True):
                outputs[index].append(output)
                positions[index] += len(output)
        for table in tables:
            table.free()
        return [torch.cat(parts) for parts in outputs]

    def worst(self, cases):
        """Largest difference to PEFT over all cases run in one batch, relative to each one's largest number."""
        attached = [self.attach(case.directory, paged=index % 2 == 0) for index, case in enumerate(cases)]
        sequences = []
        for case, (handle, num_virtual) in zip(cases, attached, strict=True):
            virtual = torch.zeros(num_virtual - case.num_embedded, self.span.hidden_size)
            sequences.append((torch.cat([virtual, case.entering_TH]), handle))
        outputs = self.run(sequences)
        errors = []
        for case, output in zip(cases, outputs, strict=True):
            ours = output[len(output) - len(case.leaving_TH) :]
            assert torch.isfinite(ours).all()
            errors.append(float((ours - case.leaving_TH).abs().max() / case.leaving_TH.abs().max()))
        for handle, _ in attached:
            if handle >= 0:
                self.span.detach(handle)
        return errors


def cases_of(name, configs, tmp_path):
    """A case for the base, and one for each config."""
    family = FAMILIES[name]
    directories = [
        save_adapter(family.model(), config, tmp_path / f"adapter-{index}", seed=index)
        for index, config in enumerate(configs)
    ]
    return [
        run_peft(family, directory, LENGTHS[index % len(LENGTHS)], seed=index)
        for index, directory in enumerate([*directories, None])
    ]
