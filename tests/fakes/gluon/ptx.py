"""Inline PTX of kernels, run on tensors: the instructions that unpack numbers, on pairs of 16 bits."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

_SIGN = 1 << 31
_DTYPES = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


def run_ptx(text: str, inputs: Sequence[Tensor]) -> Tensor:
    """$0 of the instructions, of inputs $1, $2, ...; all int32 tensors of words, of one shape."""
    registers = {f"${number}": words for number, words in enumerate(inputs, 1)}

    def read(operand: str) -> Tensor:
        if operand in registers:
            return registers[operand]
        return torch.full_like(inputs[0], (int(operand, 0) + _SIGN) % (2 * _SIGN) - _SIGN)

    for statement in text.strip().strip("{}").split(";"):
        statement = statement.strip()
        # Predicates have no other use than to guard an instruction that changes no register.
        if not statement or re.match(r"\.reg|setp|@\w+ nanosleep", statement):
            continue
        name, _, rest = statement.partition(" ")
        target, *operands = (operand.strip() for operand in rest.split(","))
        registers[target] = _execute(name, [read(operand) for operand in operands])
    return registers["$0"]


def _execute(name: str, operands: list[Tensor]) -> Tensor:
    match name.split("."):
        case ["mov", "b32"]:
            return operands[0]
        case ["shr", "u32"]:
            return ((operands[0].long() & 0xFFFFFFFF) >> operands[1]).to(torch.int32)
        case ["shl", "b32"]:
            return operands[0] << operands[1]
        case ["and", "b32"]:
            return operands[0] & operands[1]
        case ["or", "b32"]:
            return operands[0] | operands[1]
        case ["xor", "b32"]:
            return operands[0] ^ operands[1]
        case ["lop3", "b32"]:
            return _look_up(operands[:3], int(operands[3].flatten()[0]))
        case [operation, "rn", ("f16x2" | "bf16x2") as kind]:
            return _calculate(operation, operands, _DTYPES[kind])
    raise NotImplementedError(name)


def _look_up(operands: list[Tensor], table: int) -> Tensor:
    """Bit by bit: the table's bit whose number the three operands' bits are."""
    result = torch.zeros_like(operands[0])
    for place in range(8):
        if table >> place & 1:
            bits = [words if place >> 2 - index & 1 else ~words for index, words in enumerate(operands)]
            result |= bits[0] & bits[1] & bits[2]
    return result


def _calculate(operation: str, operands: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Exactly, and then rounded."""
    numbers = [words.view(dtype).double() for words in operands]
    if operation == "fma":
        result = numbers[0] * numbers[1] + numbers[2]
    else:
        result = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[operation](*numbers)
    return result.to(dtype).view(torch.int32)
