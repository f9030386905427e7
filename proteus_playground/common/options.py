"""Command-line options and values that several commands share, each declared and parsed in one place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from .outputs import output_file, output_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
UNITS = {"k": 1024, "m": 1024**2}  # of token counts
LARGEST = 2**31 - 1  # of heads, features and tokens that an option takes as a plain number
LARGEST_SEED = 2**63 - 1
LARGEST_LENGTH = 2**40  # tokens: more than any machine holds


def no_huge_number(param: typer.CallbackParam, value: int) -> int:
    """The callback of a number that no machine could hold if it were larger; so its help needs to show no range."""
    if value > (most := LARGEST_SEED if param.name == "seed" else LARGEST):
        raise typer.BadParameter(f"{value}: must be at most {most}")
    return value


Lengths = Annotated[str, typer.Option(help="Token counts: 4k,1m is a list; 4k..1m doubles; 4k..1m/4 multiplies by 4.")]
Width = Annotated[int, typer.Option(help="Model width D.", callback=no_huge_number)]
Heads = Annotated[int, typer.Option(help="Query heads.", callback=no_huge_number)]
Groups = Annotated[str, typer.Option(help="Numbers of KV groups, comma-separated; each must divide heads.")]
HeadDim = Annotated[int, typer.Option(help="Features per head.", callback=no_huge_number)]
Shortlist = Annotated[int, typer.Option(help="L: keys read per query.", callback=no_huge_number)]
Precision = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
Backend = Annotated[str, typer.Option(help="Backend of ours; auto chooses one for the device.")]
Config = Annotated[str, typer.Option(help='Other fields of AttentionConfig as JSON, such as {"keep_ratio": 0.5}.')]
Cap = Annotated[float, typer.Option(help="Memory limit in GB (1e9 bytes) on CUDA; 0 sets none.")]
Seed = Annotated[int, typer.Option(help="Seed of weights and inputs.", min=0, callback=no_huge_number)]
Alpha = Annotated[float, typer.Option(help="Flux alpha, 0 to 1.")]
Out = Annotated[str, typer.Option(help="JSON file to write.", callback=output_file)]
Folder = Annotated[Path, typer.Option(help="Folder; a run that was stopped goes on there.", callback=output_folder)]


def parse_lengths(text: str, option: str = "--lengths") -> list[int]:
    """'1k,4096,1m' -> [1024, 4096, 1048576]; '1k..8k' doubles and '1k..1m/4' goes in steps of 4, ends included."""
    lengths: list[int] = []
    for part in text.lower().split(","):
        span, slash, step = part.partition("/")
        low, dots, high = span.partition("..")
        numbers = [_number(low), _number(high if dots else low), _number(step if slash else "2")]
        if None in numbers or numbers[1] < numbers[0] or numbers[2] < 2 or (slash and not dots):
            raise typer.BadParameter(
                f"{part!r}: must be whole numbers >= 1 separated by commas, such as 1k,4096,1m, or a range that "
                "doubles, 4k..1m, or multiplies, 4k..1m/4; at most 2**40",
                param_hint=option,
            )
        tokens, last, factor = numbers
        while tokens <= last:
            lengths.append(tokens)
            tokens *= factor
    return lengths


def parse_size(text: str, option: str) -> int:
    """'64k' -> 65536; option: named in the error."""
    number = _number(text.lower())
    if number is None:
        raise typer.BadParameter(
            f"{text!r}: must be a whole number >= 1, at most 2**40, such as 500, 64k or 1m", param_hint=option
        )
    return number


def _number(text: str) -> int | None:
    digits, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    if not digits.isdecimal() or len(digits) > 15:
        return None
    return int(digits) * unit if 1 <= int(digits) * unit <= LARGEST_LENGTH else None


def parse_alphas(text: str) -> list[float | None]:
    """'0.5,1,auto' -> [0.5, 1.0, None]; None means that alpha follows from the length."""
    alphas: list[float | None] = []
    for part in text.lower().split(","):
        try:
            alpha = None if part == "auto" else float(part)
        except ValueError:
            alpha = -1.0
        if alpha is not None and not 0 <= alpha <= 1:
            raise typer.BadParameter(f"{part!r}: must be numbers in [0, 1] or auto", param_hint="--alphas")
        alphas.append(alpha)
    return alphas


def parse_config(text: str, option: str = "--config") -> dict:
    """A JSON object of `AttentionConfig` fields; their values are checked when the config is made."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"{text[:200]!r}: must be a JSON object", param_hint=option)
    return fields


@contextmanager
def fields_of(option: str) -> Iterator[None]:
    """Names `option` where the fields that it holds have unknown names or values of another type."""
    try:
        yield
    except TypeError as err:
        raise typer.BadParameter(str(err), param_hint=option) from err


def choose(option: str, value: str, allowed):
    """`value` if it is allowed; if `allowed` is a dict, its entry for `value`."""
    if value not in allowed:
        raise typer.BadParameter(f"{value!r}: must be one of {', '.join(allowed)}", param_hint=option)
    return allowed[value] if isinstance(allowed, dict) else value


def choose_some(option: str, text: str, allowed) -> list[str]:
    """Comma-separated names without repetitions; an empty text means no names."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        choose(option, name, allowed)
    return list(dict.fromkeys(names))


def pick_device(name: str) -> torch.device:
    """The device called `name`, if this machine has it."""
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(name):
        allowed = ", ".join(n for n, ok in usable.items() if ok)
        raise typer.BadParameter(f"{name!r}: must be one of {allowed} on this machine", param_hint="--device")
    return torch.device(name)


def hold_to(cap_gb: float, device: torch.device) -> None:
    """Limit what this process may allocate on a CUDA device to `cap_gb` GB (1e9 bytes); 0 sets no limit."""
    if cap_gb < 0 or (cap_gb and device.type != "cuda"):
        raise typer.BadParameter(f"{cap_gb:g} on {device.type}: must be 0, or above 0 on cuda", param_hint="--cap")
    if cap_gb:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * 1e9 / whole))
