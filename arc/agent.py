"""The grid agent: predicts the output grid of a query under a prompt.

Tokens are the cells of the query's canvas, with 2-D rotary positions. Blocks are shared over `passes` repetitions, each
followed by a prediction that is supervised and read back in. The agent starts from the evidence: its colour logits are
the log of a mixture over the evidence tables' predictions, whose weights (whom to trust, for this task, at this cell)
it learns to shift, plus what the network adds; its size logits likewise start from the size rules. The prompt
modulates the blocks, the trust in each table and each rule, and the sharpness and copy strength, so refining a prompt
re-decides these.

What no table says has to be fetched from another cell of the input: the colours that each head looks at are voices of
the same mixture, the only ones where all tables are silent. With eight heads each sees the input under another
symmetry of the square, displaced by as much as the prompt says.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc import fused, mixture
from arc.batches import OUTSIDE, QueryBatch, reverse_queries
from arc.evidence import CLASS_WEIGHTS
from arc.mixture import SILENT, Sayings
from arc.tasks import MAX_SIDE, NUM_COLOURS

MIXTURE_FLOOR = 0.003  # probability mass that every colour keeps in the table mixture
SIZE_FLOOR = 1e-4  # likewise for every size
FINDINGS = 8  # things about a cell for which a task may have a colour of its own
LOOK_SHARE = -7.0  # logit of the heads' share in the mixture, to begin with: too little to outvote a table


@dataclass
class AgentOutput:
    """colour_logits: one (B, L, 10) float32 for each pass, the last is the answer; size_logits (B, 30, 30) float32: the
    score of each output size, heights 1..30 by widths 1..30."""

    colour_logits: list[Tensor]
    size_logits: Tensor

    def rows(self, chosen: Tensor) -> AgentOutput:
        """The output for the queries `chosen` (n,)."""
        return AgentOutput([logits[chosen] for logits in self.colour_logits], self.size_logits[chosen])

    def colour_log_probs(self) -> Tensor:
        """(B, L, 10) float32, log-probabilities of the last pass."""
        return F.log_softmax(self.colour_logits[-1], dim=-1)

    def size_log_probs(self) -> Tensor:
        """(B, 30, 30) float32: log-probability of each height and width together."""
        return F.log_softmax(self.size_logits.flatten(1), dim=-1).view_as(self.size_logits)

    def predicted_size(self, query: QueryBatch) -> Tensor:
        """(B, 2) int64: the most probable size that fits the query's canvas."""
        sides = torch.arange(1, MAX_SIDE + 1, device=self.size_logits.device)
        too_high, too_wide = (sides > query.canvas[:, :, None]).unbind(1)  # (B, 30) each
        fits = ~(too_high[:, :, None] | too_wide[:, None, :])
        best = self.size_logits.masked_fill(~fits, -torch.inf).flatten(1).argmax(-1)
        return torch.stack((best // MAX_SIDE, best % MAX_SIDE), dim=-1) + 1

    def inside_prediction(self, query: QueryBatch, size: Tensor | None = None) -> Tensor:
        """(B, L) bool: the token is a cell of the predicted grid (or of one of the given size (B, 2))."""
        size = self.predicted_size(query) if size is None else size
        return query.valid & (query.row < size[:, :1]) & (query.column < size[:, 1:])

    def predicted_colours(self, query: QueryBatch) -> Tensor:
        """(B, L) int64: the predicted colour of each token, -1 outside the predicted grid."""
        return self.colour_logits[-1].argmax(-1).masked_fill(~self.inside_prediction(query), -1)

    def soft(self, query: QueryBatch) -> dict[str, Tensor]:
        """What the expected reward needs, the fields of `policy_refined.SoftPrediction`."""
        return {
            "colour": self.colour_log_probs(),
            "size": self.size_log_probs(),
            "inside": self.inside_prediction(query),
            "target": query.target,
            "target_size": query.target_size,
            "area": self.predicted_size(query).prod(1),
        }

    def pair_loss(self, query: QueryBatch) -> Tensor:
        """(B,) mean cross-entropy of the target's cells, in nats."""
        wanted = query.target >= 0
        cells = F.cross_entropy(self.colour_logits[-1].transpose(1, 2), query.target.clamp(min=0), reduction="none")
        return (cells * wanted).sum(1) / wanted.sum(1).clamp(min=1)

    def predicted_grid(self, query: QueryBatch, size: Tensor | None = None) -> Tensor:
        """(B, 30, 30) int64, -1 outside the grid: the hard prediction, at its native size (or at a known `size` (B,
        2))."""
        row, column = query.row.long(), query.column.long()
        inside = self.inside_prediction(query, size)
        colours = self.colour_logits[-1].argmax(-1).masked_fill(~inside, -1)  # (B, L)
        place = torch.where(query.valid, row * MAX_SIDE + column, MAX_SIDE * MAX_SIDE)  # padding goes to a spare cell
        grid = colours.new_full((len(query), MAX_SIDE * MAX_SIDE + 1), -1).scatter(1, place, colours)
        return grid[:, :-1].reshape(-1, MAX_SIDE, MAX_SIDE)


@torch.no_grad()
def there_and_back(
    agent: GridAgent, query: QueryBatch, outputs: Sequence[AgentOutput], prompts: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """For the passes before and after refinement, with the prompts they were made under: the predicted grids (B, 30,
    30), and the inputs predicted back from them.

    Where both passes predict the same grid, the way back is not computed: what it would give is taken to be the same,
    so d_rev is exactly 0 there.
    """
    grids = [output.predicted_grid(query) for output in outputs]
    reversed_grids = [torch.full_like(grids[0], -1) for _ in grids]
    changed, asked = reverse_queries(grids, query)
    if asked is not None:
        # One pass for both, the second half under the second prompts.
        asked.owner[len(changed) :] += len(prompts[0])
        found = agent(asked, torch.cat(list(prompts)), reverse=True).predicted_grid(asked, size=asked.out_size)
        for back, part in zip(reversed_grids, found.split(len(changed)), strict=True):
            back[changed] = part
    return list(zip(grids, reversed_grids, strict=True))


@torch.no_grad()
def voted_grid(query: QueryBatch) -> Tensor:
    """(B, 30, 30) int64, -1 outside: the evidence's training-free answer, `QueryEvidence.vote` for a whole batch."""
    sayings = Sayings.of(query.codes[..., query.tables])
    by_class = _log_class_weights(query.vote_weight.device)
    trusted = mixture.trust(torch.log(query.vote_weight[:, query.tables] + 1e-12), by_class, sayings)
    answer = AgentOutput([mixture.vote(trusted, sayings)], torch.empty(0))
    return answer.predicted_grid(query, size=query.out_size)


@functools.cache
def _log_class_weights(device: torch.device) -> Tensor:
    return torch.log(torch.from_numpy(CLASS_WEIGHTS[1:]).to(device) + 1e-12)


def one_hot(index: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., classes): 1 where the class is that of index (...), all 0 for one beyond them. Unlike torch's it looks at
    no value first, which on a GPU is a wait."""
    marks = torch.empty(*index.shape, classes, dtype=dtype, device=index.device)
    return torch.eq(index[..., None], torch.arange(classes, dtype=index.dtype, device=index.device), out=marks)


def rotary_frequencies(head_dim: int) -> Tensor:
    """(head_dim // 4,) radians a cell, for each axis (RoFormer, arXiv:2104.09864)."""
    # grids are at most 30 wide: no need for slow ones
    return 10.0 ** -torch.linspace(0, 1.5, head_dim // 4) * (math.pi / 2)


def rotary_angles(place: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (..., head_dim // 2) each, of places (..., 2) in cells, which need not be whole: rows first."""
    angles = (place[..., None] * frequencies).flatten(-2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply 2-D rotary positions. x (B, heads, L, d); cos, sin (B, 1, L, d // 2): rows first, then columns."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@dataclass
class Places:
    """Where tokens stand: place (B, 1, L, 2) as rows and columns, and as rotary angles, cos and sin (B, 1 or heads, L,
    head width // 2), of the keys. frequencies: of the angles.

    With a multiple of eight heads each of them sees the input under another symmetry of the square: at distance zero
    from a cell of the output stands the input's cell that the symmetry brings there. So mirroring and turning are a
    matter of choosing a head. Shifting is one of choosing a distance: each head looks from a place as far from the
    cell's own as the condition says.

    turns: the angles of `place` and of the keys as complex numbers where the blocks are those of arc/fused.py. held:
    such blocks compute no gradient of their weights.
    """

    place: Tensor
    key: tuple[Tensor, Tensor]
    frequencies: Tensor
    turns: tuple[Tensor, Tensor] | None = None
    held: bool = False


class Block(nn.Module):
    """Pre-norm attention and squared-ReLU MLP, shift and scale set by the condition (adaLN, arXiv:2212.09748), which
    also sets how sharply each head looks, how much it counts, and how far away it looks."""

    def __init__(self, width: int, heads: int, condition: int) -> None:
        super().__init__()
        self.heads = heads
        self.looking = nn.Linear(condition, 4 * heads)  # log-sharpness, gain, rows and columns away, of each head
        nn.init.zeros_(self.looking.weight)
        with torch.no_grad():  # the best match scores 8, whatever the heads' width
            self.looking.bias.zero_()[:heads] = math.log(8 / math.sqrt(width // heads))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.modulation = nn.Linear(condition, 4 * width)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(
        self, x: Tensor, condition: Tensor, places: Places, mask: Tensor | None, colours: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, W), condition (B, C), mask (B, 1, 1, L) additive or None, colours (B, L, 10) of the input, one-hot
        -> (B, L, W), and the colours that each head looked at (B, heads, L, 10)."""
        shift_a, scale_a, shift_m, scale_m = self.modulation(condition)[:, None].chunk(4, dim=-1)  # (B, 1, W) each
        if places.turns is not None:
            layers = (self.qkv, self.out, self.up, self.down)
            qkv, out, up, down = (layer.weight.detach() if places.held else layer.weight for layer in layers)
            looking, turns = self.looking(condition), (places.turns, places.frequencies)
            x, looked_at = fused.attention(x, shift_a, scale_a, looking, qkv, out, *turns, mask, colours)
            return fused.mlp(x, shift_m, scale_m, up, down), looked_at
        normed = F.rms_norm(x, x.shape[-1:]) * (1 + scale_a) + shift_a
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
        looking = self.looking(condition).float()[:, :, None, None].chunk(4, dim=1)  # (B, heads, 1, 1) each
        sharpness, gain, away = looking[0], looking[1], torch.cat(looking[2:], -1)
        # QK-norm keeps bf16 scores in range
        seen_from = rotary_angles(places.place + away, places.frequencies)
        q = rotate(F.rms_norm(q, q.shape[-1:]), *seen_from) * sharpness.clamp(max=2).exp()
        k = rotate(F.rms_norm(k, k.shape[-1:]), *places.key)
        seen = torch.cat((v, colours[:, None].to(v.dtype).expand(-1, self.heads, -1, -1)), -1)
        values, looked_at = attend(q, k, seen, mask).split((v.shape[-1], NUM_COLOURS), -1)
        x = x + self.out((values * (1 + gain)).transpose(1, 2).flatten(2))
        normed = F.rms_norm(x, x.shape[-1:]) * (1 + scale_m) + shift_m
        return x + self.down(F.relu(self.up(normed)).square()), looked_at


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention, (B, heads, L, d) each; mask (B, 1, 1, L) additive or None.

    On CPU the plain products beat torch's fused kernel at these sizes; scores stay in v's precision there (softmax
    accumulates in fp32 inside), because moving L x L scores through memory is what costs.
    """
    mask = None if mask is None else mask.to(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        q, k = q.to(v.dtype), k.to(v.dtype)
        if v.device.type != "cpu":
            wide = F.pad(v, (0, -v.shape[-1] % 8))  # the fused kernels want multiples of 8
            return F.scaled_dot_product_attention(q, k, wide, attn_mask=mask)[..., : v.shape[-1]]
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(-1) @ v


class GridAgent(nn.Module):
    """See the module's docstring. num_tables, num_rules: of arc.evidence; prompt is (prompts, K, D)."""

    def __init__(
        self,
        num_tables: int,
        num_rules: int,
        prompt_len: int,
        prompt_dim: int,
        *,
        width: int = 128,
        heads: int = 2,
        blocks: int = 2,
        passes: int = 2,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 4:
            raise ValueError(f"agent width {width} must be a multiple of 4 * heads ({4 * heads})")
        self.heads, self.passes = heads, passes
        self.is_compiled = False
        condition = max(width, 128)  # narrow agents too: it carries all that is known of the task
        prompt = prompt_len * prompt_dim
        # cells -> tokens: 3x3 input colours, each table's class and whether it agrees with the vote, the vote, flags
        self.neighbour_embedding = nn.Linear(9 * (NUM_COLOURS + 1), width, bias=False)
        self.table_embedding = nn.Linear(4 * num_tables, width, bias=False)
        self.vote_embedding = nn.Linear(NUM_COLOURS + 6, width)
        self.read_back = nn.Linear(NUM_COLOURS, width, bias=False)
        # what conditions the whole query: the tables' record on the demonstrations, the prompt, the view, the direction
        self.prompt_norm = nn.RMSNorm(prompt_dim)
        self.record_embedding = nn.Linear(3 * num_tables, condition)
        self.prompt_embedding = nn.Linear(prompt, condition, bias=False)
        self.view_embedding = nn.Linear(8 + NUM_COLOURS * NUM_COLOURS, condition, bias=False)
        self.direction = nn.Embedding(2, condition)
        self.condition = nn.Linear(condition, condition)
        self.blocks = nn.ModuleList(Block(width, heads, condition) for _ in range(blocks))
        # how the evidence is weighed: by class, by task and prompt, by cell
        self.class_trust = nn.Parameter(torch.log(torch.from_numpy(CLASS_WEIGHTS[1:])))
        self.task_trust = nn.Linear(condition, num_tables)
        self.prompt_trust = nn.Linear(prompt, num_tables, bias=False)
        self.cell_trust = nn.Linear(width, num_tables, bias=False)
        self.head = nn.Linear(width, NUM_COLOURS)
        # what the prompt makes of an input colour, and of what the network found out about a cell: a task's own colours
        self.findings = nn.Linear(width, FINDINGS, bias=False)
        self.paints = nn.Linear(prompt, (NUM_COLOURS + FINDINGS) * NUM_COLOURS, bias=False)
        self.sharpness = nn.Linear(condition, 2)  # of the mixture, and strength of copying the input
        self.rule_trust = nn.Linear(condition, num_rules)
        self.rule_record = nn.Parameter(torch.zeros(2))
        self.size_features = nn.Linear(width + 2 * MAX_SIDE, width)
        self.size_condition = nn.Linear(condition, width)
        self.size_head = nn.Linear(width, 2 * MAX_SIDE)
        # the colours that the heads look at are further sources of the mixture, beside the tables
        self.look_trust = nn.Linear(condition, heads + 1)  # each head's, and the share of them all
        self.look_at_cell = nn.Linear(width, heads + 1, bias=False)
        self.start_from_the_evidence()
        self.register_buffer("frequencies", rotary_frequencies(width // heads), persistent=False)
        self.frequencies: Tensor

    def start_from_the_evidence(self) -> None:
        """Whatever adds to the evidence's answer adds nothing at first."""
        for layer in (self.task_trust, self.head, self.sharpness, self.rule_trust, self.size_head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.cell_trust, self.read_back, self.look_trust, self.look_at_cell, self.paints):
            nn.init.zeros_(layer.weight)
        with torch.no_grad():
            self.look_trust.bias.zero_()[-1] = LOOK_SHARE
        # Not zero: a prompt that moves nothing at the start would leave Qwen without gradient in the first step (fix
        # 1). Half a nat: from 0.02, refinement found too little to hold on to (development split).
        nn.init.normal_(self.prompt_trust.weight, std=0.5 / math.sqrt(self.prompt_trust.in_features))

    def compile_blocks(self, say: Callable[[str], None]) -> None:
        """The blocks through torch.compile from now on, one code for all of them and for all sizes. Says so, and
        leaves them as they are, where this machine cannot compile."""
        try:
            device = self.head.weight.device
            torch.compile(torch.neg, dynamic=True)(torch.ones(3, device=device))
        except Exception as problem:  # whatever a compiler, or its absence, may raise
            reason = (str(problem).strip() or type(problem).__name__).splitlines()[0][:160]
            say(f"--compile: not compiled, this machine cannot ({reason})")
            return
        for block in self.blocks:
            block.compile(dynamic=True)
        self.is_compiled = True

    @property
    def description(self) -> str:
        """One line of a run's opening."""
        count, width = sum(p.numel() for p in self.parameters()), self.head.in_features
        return f"Agent: {count:,} parameters, {len(self.blocks)} blocks x {self.passes} passes, width {width}"

    def forward(self, query: QueryBatch, prompt: Tensor, *, reverse: bool = False, held: bool = False) -> AgentOutput:
        """Predict outputs. prompt (P, K, D): query i is answered under prompt[query.owner[i]].

        reverse=True: the queries ask for the input of a given output (the reversibility term's direction flag).
        held=True: the prompt's gradient will be asked for, the weights' not (which the fused blocks cannot know).
        """
        prompt = self.prompt_norm(prompt[query.owner].float()).flatten(1)  # (B, K * D)
        condition = self.query_condition(query, prompt, reverse)  # (B, C)
        tables, sayings = query.tables, Sayings.of(query.codes[..., query.tables])
        by_query = torch.log(query.vote_weight[:, tables] + 1e-12) + self.task_trust(condition)[:, tables]
        by_query = by_query + self.prompt_trust(prompt)[:, tables]  # (B, T)
        trusted = mixture.trust(by_query.float(), self.class_trust.detach() if held else self.class_trust, sayings)
        token = self.embed_cells(query, sayings, trusted)  # (B, L, W)
        sharpness, copying = self.sharpness(condition).float()[:, None].unbind(-1)  # (B, 1)
        copied = one_hot(query.neighbours[..., 4], NUM_COLOURS)  # (B, L, 10)
        paints = self.paints(prompt).float().unflatten(-1, (-1, NUM_COLOURS))  # (B, 10 + FINDINGS, 10)
        reads = self.reads(tables, held=held)
        places = self.places(query, held=held and not self.is_compiled)
        mask = None
        if query.padded or self.is_compiled:  # one code for both, where it has to be compiled
            mask = torch.zeros_like(query.valid, dtype=torch.float32).masked_fill(~query.valid, -1e4)[:, None, None]
        logits: list[Tensor] = []
        x = token if places.turns is None else token.float()
        for step in range(1, self.passes + 1):
            for block in self.blocks:
                x, looked_at = block(x, condition, places, mask, copied)
            normed = F.rms_norm(x, x.shape[-1:]) if places.turns is None else fused.Unit.apply(x)
            mixed, read = mixture.readout(normed, trusted, reads, sayings)  # (B, L, 10), (B, L, heads + 1 + F + 10)
            look, finding, own = read.split((self.heads + 1, FINDINGS, NUM_COLOURS), -1)
            looks = self.look_trust(condition)[:, None].float() + look
            share = torch.where(sayings.spoken > 0, looks[..., -1:].sigmoid(), 1.0)  # (B, L, 1)
            fetched = torch.einsum("blh,bhlc->blc", looks[..., :-1].softmax(-1), looked_at.float())
            mixed = (1 - share) * mixed + share * fetched
            found = torch.cat((copied, finding), -1)  # (B, L, 10 + FINDINGS)
            own = own + self.head.bias + copying[..., None] * copied + found @ paints
            logits.append(own + (1 + sharpness)[..., None] * torch.log(mixed + MIXTURE_FLOOR))
            if step < self.passes:
                x = x + self.read_back(logits[-1].softmax(-1))
        return AgentOutput(logits, self.size_logits(query, condition, normed))

    def reads(self, tables: slice, *, held: bool) -> Tensor:
        """(T + heads + 1 + FINDINGS + 10, W): what a cell is read with after a pass. A token is read at length 1."""
        layers = (self.look_at_cell, self.findings, self.head)
        weight = torch.cat((self.cell_trust.weight[tables], *(layer.weight for layer in layers)))
        return (weight.detach() if held else weight) * weight.shape[-1] ** -0.5

    def query_condition(self, query: QueryBatch, prompt: Tensor, reverse: bool) -> Tensor:
        """(B, C): everything that holds for the query as a whole."""
        view = torch.cat((one_hot(query.dihedral, 8), one_hot(query.colours, NUM_COLOURS).flatten(1)), 1)
        direction = self.direction(torch.full_like(query.dihedral, int(reverse)))
        record = self.record_embedding(query.table_stats.flatten(1))
        mixed = record + self.prompt_embedding(prompt) + self.view_embedding(view) + direction
        return F.rms_norm(self.condition(F.silu(mixed)), (mixed.shape[-1],))

    def embed_cells(self, query: QueryBatch, sayings: Sayings, trusted: Tensor) -> Tensor:
        """(B, L, W): what stands at and around each cell, what the tables say, where the cell is."""
        dtype = fused.product_dtype(trusted)
        vote = mixture.vote(trusted, sayings)  # (B, L, 10), the weighted vote before any look at the grid
        classes = sayings.classes(vote.argmax(-1), dtype)  # (B, L, 4 T)
        around = one_hot(query.neighbours, OUTSIDE + 1, dtype).flatten(2)  # (B, L, 99)
        row, column = query.row.float(), query.column.float()
        height, width = query.out_size[:, :1].float(), query.out_size[:, 1:].float()
        flags = torch.stack(
            (
                query.in_output.float(),
                query.valid.float(),
                row / height,
                column / width,
                (row == height - 1).float(),
                (column == width - 1).float(),
            ),
            -1,
        )
        by_table = self.table_embedding.weight.unflatten(1, (-1, 4))[:, query.tables]  # (W, T, 4)
        return (
            self.neighbour_embedding(around)
            + F.linear(classes, by_table.transpose(1, 2).flatten(1))
            + self.vote_embedding(torch.cat((torch.log(vote + MIXTURE_FLOOR), flags), -1))
        )

    def places(self, query: QueryBatch, *, held: bool = False) -> Places:
        """Rotary positions of the query's cells; under each head's symmetry, where there are heads for all."""
        place = torch.stack((query.row, query.column), -1).float()[:, None]  # (B, 1, L, 2)
        turned = [place]
        if self.heads % 8 == 0:
            rows, columns = place.unbind(-1)
            height, width = (query.in_size[:, None, None] - 1).unbind(-1)  # (B, 1, 1) each
            mirrored = [(a, b) for a in (rows, height - rows) for b in (columns, width - columns)]
            turned = [torch.stack(pair, -1) for a, b in mirrored for pair in ((a, b), (b, a))] * (self.heads // 8)
        places = Places(place, rotary_angles(torch.cat(turned, 1), self.frequencies), self.frequencies, held=held)
        if place.device.type == "cpu" and not self.is_compiled:
            own = places.key if len(turned) == 1 else rotary_angles(place, self.frequencies)
            places.turns = torch.complex(*own), torch.complex(*places.key)
        return places

    def size_logits(self, query: QueryBatch, condition: Tensor, normed: Tensor) -> Tensor:
        """(B, 30, 30): log of the rules' weighted vote for each size, plus a learned correction of each side."""
        scores = query.rule_logits + query.rule_features @ self.rule_record + self.rule_trust(condition).float()
        applies = torch.isfinite(query.rule_logits)
        weights = scores.masked_fill(~applies, SILENT).softmax(-1) * applies  # (B, R), zero if no rule applies
        # The size that the canvas was made for gets a little vote of its own: it stands where no rule applies.
        sizes = torch.cat((query.rule_sizes.long().clamp(min=1), query.out_size[:, None]), 1)  # (B, R + 1, 2)
        weights = torch.cat((weights, weights.new_full((len(query), 1), 0.01)), 1)
        votes = torch.zeros(len(query), MAX_SIDE * MAX_SIDE, device=weights.device)
        places = (sizes[..., 0] - 1) * MAX_SIDE + sizes[..., 1] - 1
        votes = votes.scatter_add(1, places, weights).unflatten(1, (MAX_SIDE, MAX_SIDE))
        real = query.valid[..., None].to(normed.dtype)
        pooled = (normed * real).sum(1) / real.sum(1)
        sides = one_hot(query.in_size - 1, MAX_SIDE, pooled.dtype).flatten(1)  # (B, 60)
        features = self.size_features(torch.cat((pooled, sides), -1))
        side = self.size_head(F.silu(features + self.size_condition(condition))).float().unflatten(-1, (2, MAX_SIDE))
        return torch.log(votes + SIZE_FLOOR) + side[:, 0, :, None] + side[:, 1, None, :]
