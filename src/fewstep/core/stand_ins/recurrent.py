"""`nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells, one time step at a time.

Out of operations that `torch.vmap` and second derivatives know, on every device. Packed sequences
are left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.core.stand_ins.registry import stands_in_for

State = tuple[Tensor, ...]  # h, and c of an LSTM; each (batch, hidden)
_Step = Callable[[Tensor, State, Tensor, Tensor | None], State]


def _lstm(x: Tensor, state: State, w: Tensor, b: Tensor | None) -> State:
    """Return (h, c) after a step, x being the input's part of the gates.

    c = sigmoid(f) * c + sigmoid(i) * tanh(g); h = sigmoid(o) * tanh(c)
    """
    h, c = state
    i, f, g, o = (x + F.linear(h, w, b)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, state: State, w: Tensor, b: Tensor | None) -> State:
    """Return (h,) after a step.

    n = tanh(x_n + sigmoid(r) * h_n); h = (1 - sigmoid(z)) * n + sigmoid(z) * h
    """
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, w, b).chunk(3, dim=-1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + torch.sigmoid(x_z + h_z) * (h - n),)


def _rnn(
    activation: Callable[[Tensor], Tensor], x: Tensor, state: State, w: Tensor, b: Tensor | None
) -> State:
    """Return (h,) after a step: h = activation(x + W h + b)."""
    return (activation(x + F.linear(state[0], w, b)),)


def _is_packed(x: Tensor, second: Any, third: Any, *others: Any) -> bool:
    """Whether the arguments are (data, batch sizes, state, ...), not (input, state, weights)."""
    return isinstance(second, Tensor) and not isinstance(third, list)


def _cell(
    step: _Step, x: Tensor, given: Tensor | State, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None,
) -> Tensor | State:  # fmt: skip
    gates = F.linear(x, w_ih, b_ih)
    if isinstance(given, Tensor):
        return step(gates, (given,), w_hh, b_hh)[0]
    return step(gates, tuple(given), w_hh, b_hh)


def _layers(
    step: _Step, x: Tensor, given: Tensor | State, weights: Sequence[Tensor], has_biases: bool,
    num_layers: int, dropout: float, training: bool, bidirectional: bool, batch_first: bool,
) -> State:  # fmt: skip
    """Return outputs (time, batch, features) and the state after the last step of each layer.

    Args:
        step: What a time step does.
        x: (time, batch, features); batch before time with `batch_first`.
        given: The states before, each (layers * directions, batch, hidden).
        weights: W_ih, W_hh, then biases and the projection if any, by layer and direction.
        has_biases: Whether there are biases.
        num_layers: Layers, one upon the other.
        dropout: Probability, between layers.
        training: Whether there is dropout.
        bidirectional: Whether each layer also runs backwards in time.
        batch_first: The order of the first two dimensions of `x` and of the outputs.
    """
    states = (given,) if isinstance(given, Tensor) else given
    directions = 2 if bidirectional else 1
    of_each = len(weights) // (num_layers * directions)
    after = []
    y = x.transpose(0, 1) if batch_first else x
    for layer in range(num_layers):
        if layer > 0 and dropout > 0:
            y = F.dropout(y, dropout, training)
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            w_ih, w_hh, *others = weights[i * of_each : (i + 1) * of_each]
            b_ih, b_hh = others[:2] if has_biases else (None, None)
            projection = others[-1] if of_each % 2 else None
            gates = F.linear(y, w_ih, b_ih)  # of all times at once
            state = tuple(s[i] for s in states)
            seen = []
            for x_t in gates.flip(0) if direction else gates:
                state = step(x_t, state, w_hh, b_hh)
                if projection is not None:
                    state = (F.linear(state[0], projection), *state[1:])
                seen.append(state[0])
            outputs.append(torch.stack(seen[::-1] if direction else seen))
            after.append(state)
        y = torch.cat(outputs, dim=-1)
    y = y.transpose(0, 1) if batch_first else y
    return y, *(torch.stack(s) for s in zip(*after, strict=True))


def _register(step: _Step, layer: Any, cell: Any) -> None:
    @stands_in_for(layer)
    def of_layers(*args: Any) -> Any:
        return NotImplemented if _is_packed(*args) else _layers(step, *args)

    stands_in_for(cell)(partial(_cell, step))


_register(_lstm, torch.lstm, torch.lstm_cell)
_register(_gru, torch.gru, torch.gru_cell)
_register(partial(_rnn, torch.tanh), torch.rnn_tanh, torch.rnn_tanh_cell)
_register(partial(_rnn, torch.relu), torch.rnn_relu, torch.rnn_relu_cell)
