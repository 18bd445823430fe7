"""The grid agent: predicts the output grid of a query under a prompt.

Tokens are the cells of the query's canvas, with 2-D rotary positions. Blocks are shared over `passes` repetitions, each
followed by a prediction that is supervised and read back in. The agent starts from the evidence: its colour logits are
the log of a mixture over the evidence tables' predictions, whose weights (whom to trust, for this task, at this cell)
it learns to shift, plus what the network adds; its size logits likewise start from the size rules. The prompt
modulates the blocks, the trust in each table and each rule, and the sharpness and copy strength, so refining a prompt
re-decides these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc.batches import OUTSIDE, QueryBatch, reverse_queries
from arc.evidence import CLASS_WEIGHTS
from arc.tasks import MAX_SIDE, NUM_COLOURS

MIXTURE_FLOOR = 0.003  # probability mass that every colour keeps in the table mixture
SIZE_FLOOR = 1e-6  # likewise for every size
SILENT = -1e4  # logit of a table that says nothing; finite, so that a cell no table speaks about is no NaN


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
    changed = torch.nonzero((grids[0] != grids[1]).flatten(1).any(1)).flatten()
    if len(changed):
        for grid, back, under in zip(grids, reversed_grids, prompts, strict=True):
            asked = reverse_queries(grid[changed], query, changed)
            back[changed] = agent(asked, under, reverse=True).predicted_grid(asked, size=asked.out_size)
    return list(zip(grids, reversed_grids, strict=True))


@torch.no_grad()
def voted_grid(query: QueryBatch) -> Tensor:
    """(B, 30, 30) int64, -1 outside: the evidence's training-free answer, `QueryEvidence.vote` for a whole batch."""
    codes = query.codes[..., query.tables].long()
    says, confidence = codes % 10, codes // 10
    classes = torch.from_numpy(CLASS_WEIGHTS).to(query.vote_weight.device)
    trust = torch.log(query.vote_weight[:, query.tables] + 1e-12)[:, None] + torch.log(classes + 1e-12)[confidence]
    mixture = table_mixture(trust.masked_fill(confidence == 0, SILENT), says)
    return AgentOutput([mixture], torch.empty(0)).predicted_grid(query, size=query.out_size)


def rotary_tables(head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (30, head_dim // 4): angles of positions 0..29 for one axis (RoFormer, arXiv:2104.09864)."""
    frequencies = 10.0 ** -torch.linspace(0, 1.5, head_dim // 4)  # grids are at most 30 wide: no need for slow ones
    angles = torch.arange(MAX_SIDE)[:, None] * frequencies * (math.pi / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply 2-D rotary positions. x (B, heads, L, d); cos, sin (B, 1, L, d // 2): rows first, then columns."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Pre-norm attention and squared-ReLU MLP, shift and scale set by the condition (adaLN, arXiv:2212.09748)."""

    def __init__(self, width: int, heads: int, condition: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.modulation = nn.Linear(condition, 4 * width)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, L, W), condition (B, C), mask (B, 1, 1, L) additive or None -> (B, L, W)."""
        shift_a, scale_a, shift_m, scale_m = self.modulation(condition)[:, None].chunk(4, dim=-1)  # (B, 1, W) each
        normed = F.rms_norm(x, x.shape[-1:]) * (1 + scale_a) + shift_a
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
        q, k = (rotate(F.rms_norm(t, t.shape[-1:]), cos, sin) for t in (q, k))  # QK-norm keeps bf16 scores in range
        x = x + self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        normed = F.rms_norm(x, x.shape[-1:]) * (1 + scale_m) + shift_m
        return x + self.down(F.relu(self.up(normed)).square())


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention, (B, heads, L, d) each; mask (B, 1, 1, L) additive or None.

    On CPU the plain products beat torch's fused kernel at these sizes; scores stay in v's precision there (softmax
    accumulates in fp32 inside), because moving L x L scores through memory is what costs.
    """
    mask = None if mask is None else mask.to(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        q, k = q.to(v.dtype), k.to(v.dtype)
        if v.device.type != "cpu":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
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
        self.num_tables, self.passes, condition = num_tables, passes, width
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
        self.sharpness = nn.Linear(condition, 2)  # of the mixture, and strength of copying the input
        self.rule_trust = nn.Linear(condition, num_rules)
        self.rule_record = nn.Parameter(torch.zeros(2))
        self.size_head = nn.Linear(width, 2 * MAX_SIDE)
        for layer in (
            self.task_trust,
            self.cell_trust,
            self.head,
            self.sharpness,
            self.rule_trust,
            self.size_head,
            self.read_back,
        ):
            nn.init.zeros_(layer.weight)
        for layer in (self.task_trust, self.head, self.sharpness, self.rule_trust, self.size_head):
            nn.init.zeros_(layer.bias)
        # Not zero: a prompt that moves nothing at the start would leave Qwen without gradient in the first step (fix
        # 1). Half a nat: from 0.02, refinement found too little to hold on to (development split).
        nn.init.normal_(self.prompt_trust.weight, std=0.5 / math.sqrt(prompt))
        cos, sin = rotary_tables(width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    @property
    def description(self) -> str:
        """One line of a run's opening."""
        count, width = sum(p.numel() for p in self.parameters()), self.condition.in_features
        return f"Agent: {count:,} parameters, {len(self.blocks)} blocks x {self.passes} passes, width {width}"

    def forward(self, query: QueryBatch, prompt: Tensor, *, reverse: bool = False) -> AgentOutput:
        """Predict outputs. prompt (P, K, D): query i is answered under prompt[query.owner[i]].

        reverse=True: the queries ask for the input of a given output (the reversibility term's direction flag).
        """
        prompt = self.prompt_norm(prompt[query.owner].float()).flatten(1)  # (B, K * D)
        condition = self.query_condition(query, prompt, reverse)  # (B, C)
        tables, codes = query.tables, query.codes[..., query.tables].long()
        says, confidence = codes % 10, codes // 10  # (B, L, T)
        trust = torch.log(query.vote_weight[:, tables] + 1e-12) + self.task_trust(condition)[:, tables]
        trust = trust + self.prompt_trust(prompt)[:, tables]  # (B, T)
        mixed, few, many = self.class_trust
        by_class = torch.where(confidence == 3, many, torch.where(confidence == 2, few, mixed))
        trust = (trust.float()[:, None] + by_class).masked_fill(confidence == 0, SILENT)  # (B, L, T)
        token = self.embed_cells(query, says, confidence, trust)  # (B, L, W)
        sharpness, copying = self.sharpness(condition).float()[:, None].unbind(-1)  # (B, 1)
        copied = F.one_hot(query.neighbours[..., 4].long(), NUM_COLOURS + 1)[..., :NUM_COLOURS]  # (B, L, 10)
        cos, sin = (self.positions(table, query) for table in (self.cos, self.sin))
        mask = None
        if query.padded:
            mask = torch.zeros_like(query.valid, dtype=torch.float32).masked_fill(~query.valid, -1e4)[:, None, None]
        logits: list[Tensor] = []
        x = token
        for _ in range(self.passes):
            for block in self.blocks:
                x = block(x, condition, cos, sin, mask)
            normed = F.rms_norm(x, x.shape[-1:]) * x.shape[-1] ** -0.5  # length 1
            trusted = F.linear(normed, self.cell_trust.weight[tables]).float()  # (B, L, T)
            mixture = table_mixture(trust + trusted, says)  # (B, L, 10)
            own = self.head(normed).float() + copying[..., None] * copied
            logits.append(own + (1 + sharpness)[..., None] * torch.log(mixture + MIXTURE_FLOOR))
            x = x + self.read_back(logits[-1].softmax(-1))
        return AgentOutput(logits, self.size_logits(query, condition, normed))

    def query_condition(self, query: QueryBatch, prompt: Tensor, reverse: bool) -> Tensor:
        """(B, C): everything that holds for the query as a whole."""
        view = torch.cat((F.one_hot(query.dihedral, 8), F.one_hot(query.colours, NUM_COLOURS).flatten(1)), 1).float()
        direction = self.direction(torch.full_like(query.dihedral, int(reverse)))
        record = self.record_embedding(query.table_stats.flatten(1))
        mixed = record + self.prompt_embedding(prompt) + self.view_embedding(view) + direction
        return F.rms_norm(self.condition(F.silu(mixed)), (mixed.shape[-1],))

    def embed_cells(self, query: QueryBatch, says: Tensor, confidence: Tensor, trust: Tensor) -> Tensor:
        """(B, L, W): what stands at and around each cell, what the tables say, where the cell is."""
        vote = table_mixture(trust.detach(), says)  # (B, L, 10), the weighted vote before any look at the grid
        agrees = (says == vote.argmax(-1, keepdim=True)) & (confidence > 0)
        classes = torch.stack((agrees, confidence == 1, confidence == 2, confidence == 3), -1).flatten(2)  # (B, L, 4T)
        around = F.one_hot(query.neighbours.long(), OUTSIDE + 1).flatten(2)  # (B, L, 99)
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
        by_table = self.table_embedding.weight.unflatten(1, (-1, 4))  # (W, T, 4)
        table_embedding = by_table[:, query.tables].flatten(1)
        dtype = torch.get_autocast_dtype(row.device.type) if torch.is_autocast_enabled(row.device.type) else row.dtype
        return (
            self.neighbour_embedding(around.to(dtype))
            + F.linear(classes.to(dtype), table_embedding)
            + self.vote_embedding(torch.cat((torch.log(vote + MIXTURE_FLOOR), flags), -1))
        )

    def positions(self, table: Tensor, query: QueryBatch) -> Tensor:
        """(B, 1, L, head_dim // 2): the rotary table looked up by row and by column."""
        return torch.cat((table[query.row.long()], table[query.column.long()]), -1)[:, None]

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
        side = self.size_head(pooled).float().unflatten(-1, (2, MAX_SIDE))
        return torch.log(votes + SIZE_FLOOR) + side[:, 0, :, None] + side[:, 1, None, :]


def table_mixture(trust: Tensor, says: Tensor) -> Tensor:
    """(B, L, 10) float32: probability of each colour when table t, which says says[..., t], is trusted by
    softmax(trust)[..., t]. Zero everywhere where no table speaks."""
    weights = trust.softmax(-1) * (trust > SILENT / 2)
    return torch.zeros(*trust.shape[:-1], NUM_COLOURS, device=trust.device).scatter_add(-1, says, weights)
