"""Attention for rows that begin alike: outside it nothing is padded, and what rows begin with is computed once.

The rows of a batch differ in length. They share the system prompt, those of a group the whole prompt, and often the
first words of the completions. As a rectangle, half of what the linear layers compute could be padding, or the same
again. So the rows become a tree, whose nodes are tokens: the model gets each node once, all in one long row. Only
inside attention are they rows again: `layout` says where. transformers calls `attention` in every layer.
"""
import inspect
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SIMILAR = 0.7  # attention starts a new part at a row shorter than so much of the part's first, its longest


class Layout(NamedTuple):
    """Which tokens of the rows are computed, N in all, and where attention finds them."""
    computed: torch.Tensor  # (B, L) bool: True for tokens to compute; False for padding and what a row above shares
    number: torch.Tensor  # (B, L): a token's place among those computed; 0 for padding
    tokens: torch.Tensor  # (N,): those that are computed
    position: torch.Tensor  # (N,): each one's in its row
    before: torch.Tensor  # (N,): the place of the token before it in its row; at the start it means nothing
    parts: list[torch.Tensor]  # `number`, cut into rows of similar length, without most of the padding
    places: torch.Tensor  # (N,): where the parts, flattened, have each computed token

    def one_row(self) -> dict:
        """What a packed model takes in place of the rows: the tree's tokens as one long row."""
        return {"input_ids": self.tokens[None], "position_ids": self.position[None], "layout": self,
                "attention_mask": self.tokens.new_empty(1, 1, 0, 0)}  # for transformers not to make one of N x N


def layout(rows, lens) -> Layout:
    """The tree of rows (B, L) with so many tokens (B,). Sorted rows, the longest first, have the least padding.

    Nodes are numbered as they are found, row by row; a row's own are those from `known` on.
    """
    lens, tree, paths, known = lens.tolist(), {}, [], []  # tree: {(place of the token before, token): its place}
    for row, length in zip(rows.tolist(), lens):
        known.append(len(tree))
        place = -1
        path = [place := tree.setdefault((place, token), len(tree)) for token in row[:length]]
        paths.append(path + [-1] * (len(row) - length))
    number, known = (torch.tensor(places, device=rows.device) for places in (paths, known))
    computed, number = number >= known[:, None], number.clamp(min=0)
    row, position = computed.nonzero(as_tuple=True)
    tokens, before = rows[row, position], number[row, position - 1]

    cuts = [0]
    for row, length in enumerate(lens):
        if length < SIMILAR * lens[cuts[-1]]:
            cuts.append(row)
    parts = [(slice(start, end), slice(max(lens[start:end]))) for start, end in zip(cuts, [*cuts[1:], len(lens)])]
    places = torch.cat([computed[part].flatten() for part in parts]).nonzero()[:, 0]
    return Layout(computed, number, tokens, position, before, [number[part] for part in parts], places)


def attention(module, query, key, value, attention_mask, layout=None, sliding_window=None, **options):
    """As transformers calls it: query (B, heads, T, D), key and value (B, key heads, S, D) -> ((B, T, heads, D), None).

    With a `layout` B is 1, and T = S are the tokens that are computed, of all rows.
    """
    if layout is not None:
        flat = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]  # (N, heads x D)
        packed, widths, outputs = torch.cat(flat, 1), [tensor.shape[1] for tensor in flat], []
        if packed.device.type == "cpu" and packed.dtype == torch.bfloat16:
            packed = packed.float()  # a CPU's backward pass of attention takes three times as long in bfloat16
        for part in layout.parts:  # (rows, length)
            # An embedding's backward pass sums the gradients of a shared token in a fixed order, on a GPU too. It sorts
            # the places for that, so query, key and value are taken at once.
            found = functional.embedding(part, packed).split(widths, 2)
            states = [tensor.unflatten(2, (like.shape[1], -1)).transpose(1, 2)  # (rows, heads, length, D)
                      for tensor, like in zip(found, (query, key, value))]
            mask, length = None, part.shape[1]  # a causal model never looks at the padding, which is on the right
            if sliding_window and length > sliding_window:
                position = torch.arange(length, device=part.device)
                distance = position[:, None] - position
                mask = ((0 <= distance) & (distance < sliding_window))[None, None]
            output, _ = sdpa_attention_forward(module, *states, mask, **options)
            outputs.append(output.flatten(2).flatten(0, 1))
        output = torch.cat(outputs).index_select(0, layout.places)  # none twice, so here nothing has to be sorted
        return output.unflatten(1, (query.shape[1], -1))[None].to(query.dtype), None
    if query.shape[2] > 1:  # transformers' own `generate`, for whoever wants to see what the model writes
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # One new token for each row: heads with the same keys are as good as several queries, and no key is copied.
    query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    output = functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=options["scaling"])
    return output.flatten(1, 2)[:, None], None


def pack_attention(model) -> None:
    """Switches `model` to the attention above, "packed", if all its layers attend to all tokens or a sliding window,
    and nothing else lets tokens see each other. `token_logps` and the samplers ask for that name."""
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    ordinary = model._supports_attention_backend and not model._is_stateful
    ordinary &= "logits_to_keep" in inspect.signature(model.forward).parameters  # what prefilling needs
    if ordinary and model.config._attn_implementation == "sdpa" and layers <= {"full_attention", "sliding_attention"}:
        AttentionInterface.register("packed", attention)
        AttentionMaskInterface.register("packed", sdpa_mask)
        model.set_attn_implementation("packed")
