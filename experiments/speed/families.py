"""`proteus bench families`: which families of transformers' language models the patch and the cache serve exactly.

Every family is built with tiny sizes and random weights, nothing is downloaded. With flux alpha 0 a patched pass and a
`ProteusCache` have to give the logits of the model's own attention: with padding on the left, token by token, with
beams and in bfloat16. With flux alpha 1 the cache has to write what the patched pass over the whole text gives.
"""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from inspect import signature
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...attention import Gates
from ...attention.adapter import ProteusLayer
from ...common.machine import environment, markdown
from ...common.outputs import output_file
from ..pages import around, fill
from .measure import publish

SECONDS = 180  # a family that takes longer is reported as such
MOST_WEIGHTS = 20_000_000
TOKENS, PADDING, NEW = 40, 13, 24
RESULTS = ("exact", "exact but no cache", "refused", "no full attention", "not built", "wrong", "failed")
EXACT = 2e-4  # largest difference of float32 logits, as a share of the largest logit

DROP = object()  # leaves a config's own value
SIZES = {  # attributes of configs, and what they become where a config has them
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels", "swa_head_dim", "d_kv"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "local_window_size", "attention_window_size"), 16),
    "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "is_decoder": True, "add_cross_attention": False, "global_head_dim": 16, "num_global_key_value_heads": 2,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "n_shared_experts": 1, "index_n_heads": 4,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "num_kv_shared_layers": 0,
    "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "mamba_expand": 2, "ssm_state_size": 8, "chunk_size": 16, "mamba_chunk_size": 16, "conv_kernel": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "qk_head_dim": 24, "hybrid_layer_ids": [1, 3], "adapter_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1,
    "lru_width": 64, "use_cache": True, "full_attention_interval": 2,
}  # fmt: skip


LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
SPECIAL = {  # what single families need besides
    **dict.fromkeys(("axk1", "deepseek_v3", "longcat_flash", "youtu"), {"head_dim": 8}),
    **dict.fromkeys(("gemma3_text", "gemma3n_text", "exaone4", "exaone_moe", "kolibri1", "inkling_text"), LAYERS),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), {"head_dim": 16}),
    "deepseek_v2": {"head_dim": 8, "num_experts_per_tok": 2}, "ministral": LAYERS | {"head_dim": 16},
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), LAYERS | {"hidden_size_per_layer_input": 0}),
    "mistral": {"sliding_window": None}, "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "gemma3": {"text_config": LAYERS},
    "falcon": {"head_dim": DROP, "num_kv_heads": DROP}, "xlstm": {"v_head_dim": DROP, "head_dim": DROP},
    "gpt_neo": {"attention_types": [[["global"], 4]]}, "zaya": {"num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1, 3]}, "mamba2": {"num_heads": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2}, "prophetnet": {"num_hidden_layers": DROP},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16], "head_dim": DROP},
    "falcon_h1": {"mamba_d_ssm": 128}, "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2}, "xlnet": {"max_position_embeddings": DROP},
}  # fmt: skip


# -- one family -------------------------------------------------------------------------------------------------


def tiny_config(kind: str):
    """A config of the family `kind` with small sizes."""
    from transformers import CONFIG_MAPPING

    small = _small(CONFIG_MAPPING[kind]())
    for name, value in SPECIAL.get(kind, {}).items():
        part = small.get(name)
        small[name] = type(part)(**part.to_dict() | value) if isinstance(value, dict) and part is not None else value
    return CONFIG_MAPPING[kind](**{name: value for name, value in small.items() if value is not DROP})


def _small(config) -> dict:
    """Arguments that make `config`, and the configs in it, small."""
    own = config.to_dict()
    small = {name: value for name, value in SIZES.items() if own.get(name) is not None}
    if "num_key_value_heads" in small and own["num_key_value_heads"] == own.get("num_attention_heads"):
        small["num_key_value_heads"] = 4
    small |= {name: value for name, value in (("eos_token_id", None), ("pad_token_id", 0)) if hasattr(config, name)}
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            small[name] = type(part)(**_small(part))
    return small


def tiny_model(config):
    """A causal language model of `config` in evaluation mode; norms' weights are random too."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights are not tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight += 0.2 * torch.randn_like(weight)
        elif weight.dim() == 2:
            weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)
    if model.generation_config is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def try_family(kind: str) -> dict:
    """What came of the family `kind`: `result`, and where it runs `worst` and `bf16`, shares of the largest logit."""
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        model = tiny_model(tiny_config(kind))
        model(torch.arange(1, 9)[None], use_cache=False)
    except Exception as problem:
        return {"family": kind, "result": "not built", "why": _short(problem)}
    row = {"family": kind, "class": type(model).__name__}
    try:
        return row | try_model(model)
    except (TypeError, ValueError) as problem:
        return row | {"result": "refused", "why": _short(problem)}
    except Exception as problem:
        return row | {"result": "failed", "why": f"{type(problem).__name__}: {_short(problem)}"}


def _short(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300].replace("|", "/")


@torch.no_grad()
def try_model(model) -> dict:
    """The errors of a model at flux alpha 0 and 1. Raises what the patch and the cache raise."""
    from ...hf.patch import full_attention_layers, patched, surveyed

    layers = surveyed(model)[1].layers
    served = full_attention_layers(model)
    if not served:
        return {"result": "no full attention", "why": "no layer reads the whole past by softmax attention"}
    ids = 1 + torch.randint(126, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    real = mask.bool()
    dense = {i: _layer(layers[i].shape, 0.0) for i in served}
    native = model(ids, attention_mask=mask, use_cache=False).logits
    with patched(model, dense):
        ours = model(ids, attention_mask=mask, use_cache=False).logits
    top, errors = native[real].abs().max(), {"left padding": _error(ours[real], native[real])}
    cannot = ""
    try:
        errors["decoding"], errors["beams"] = _generated(model, dense, ids, mask)
        errors["sparse decoding"] = _sparse(model, {i: _layer(layers[i].shape, 1.0) for i in served}, ids)
    except ValueError as problem:
        cannot = _short(problem)
    whole = sum(facts.name is not None and facts.window is None for facts in layers)
    row = {"served": len(served), "whole": whole, "layers": len(layers), "errors": errors}
    row |= {"worst": max(errors.values()), "bf16": _bf16(model, dense, ids, mask, native, top)}
    wrong = [name for name, error in errors.items() if not error <= EXACT]
    if wrong or not row["bf16"] <= 3:
        return row | {"result": "wrong", "why": ", ".join(wrong) or "bfloat16"}
    return row | {"result": "exact but no cache" if cannot else "exact", "why": cannot}


def _layer(shape, alpha: float) -> ProteusLayer:
    torch.manual_seed(3)
    gates = Gates(shape.n_groups, 6, shape.head_dim, heads_per_group=shape.n_heads // shape.n_groups)
    gates.fit(torch.randn(200, shape.n_groups, shape.head_dim))
    return ProteusLayer(gates, shape.config(flux_alpha=alpha, shortlist=24, gates_per_group=6, route_heads=False))


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _cache(model, layers: dict[int, ProteusLayer]):
    from ...hf.cache import ProteusCache

    return ProteusCache(model, {i: layer.gates for i, layer in layers.items()}, next(iter(layers.values())).config)


def _write(model, ids: torch.Tensor, mask: torch.Tensor, cache=None, **more):
    from ...hf.patch import handed

    cached = {} if cache is None else handed(model, cache)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **cached, **more,
    )  # fmt: skip


def _generated(model, dense, ids, mask) -> tuple[float, float]:
    """Errors of tokens written one by one and with beams, beside the model's own cache."""
    native, beams = _write(model, ids, mask), _write(model, ids, mask, num_beams=3)
    with _cache(model, dense) as cache, _cache(model, dense) as other:
        ours, our_beams = _write(model, ids, mask, cache), _write(model, ids, mask, other, num_beams=3)
    error = _error(torch.stack(ours.logits), torch.stack(native.logits))
    return error, 0.0 if torch.equal(beams.sequences, our_beams.sequences) else float("inf")


def _sparse(model, layers, ids) -> float:
    """Error of a sparse cache beside the patched pass over what it wrote."""
    from ...hf.patch import patched

    with _cache(model, layers) as cache:
        out = _write(model, ids, torch.ones_like(ids), cache)
    at = {"position_ids": torch.arange(out.sequences.shape[1])[None]}  # as generate counts
    at = at if "position_ids" in signature(type(model).forward).parameters else {}
    with patched(model, layers):
        full = model(out.sequences, use_cache=False, **at).logits
    return _error(torch.stack(out.logits, 1), full[:, TOKENS - 1 : -1])


def _bf16(model, dense, ids, mask, exact, top) -> float:
    """Mean error of a patched bfloat16 pass, as a multiple of that of the model's own bfloat16 pass."""
    from ...hf.patch import patched

    model.to(torch.bfloat16)
    real = mask.bool()
    native = model(ids, attention_mask=mask, use_cache=False).logits.float()
    with patched(model, dense):
        ours = model(ids, attention_mask=mask, use_cache=False).logits.float()
    error = ((x[real] - exact[real]).abs().mean() for x in (ours, native))
    return float(next(error) / next(error).clamp(min=1e-6))


# -- all of them ------------------------------------------------------------------------------------------------


def families_command(
    family: Annotated[list[str] | None, typer.Option(help="Only this family; may be given again.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    out: Annotated[str, typer.Option(help="Write the numbers as JSON.")] = "",
    page: Annotated[Path | None, typer.Option(help="Markdown page with marks for it.", callback=output_file)] = None,
) -> None:
    """Show which families of causal language models the patch and the cache serve exactly."""
    import transformers

    names = sorted(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    unknown = sorted(set(family or ()) - set(names))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]}: not among {', '.join(names)}", param_hint="--family")
    if page:
        around(page, "families")  # raises now, and not after minutes
    rows = run_all(family or names, jobs)
    about = {"transformers": transformers.__version__, "dtype": "float32", "seed": 0}
    report = {"benchmark": "families", **environment(torch.device("cpu")), **about, "rows": rows}
    publish(report, families_table(report), out)
    if page:
        fill(page, "families", families_table(report))


def run_all(names: list[str], jobs: int) -> list[dict]:
    """`try_family` of each, in processes of their own, so that one that hangs or dies ends nothing else."""
    rows, context = {}, multiprocessing.get_context("spawn")
    todo = list(names)
    while todo:
        with context.Pool(jobs) as pool:
            waiting = [(name, pool.apply_async(try_family, (name,))) for name in todo]
            for name, answer in waiting:
                try:
                    rows[name] = answer.get(SECONDS)
                except multiprocessing.TimeoutError:
                    rows[name] = {"family": name, "result": "not built", "why": f"took more than {SECONDS} s"}
                    break
                typer.echo(f"{name}: {rows[name]['result']} {rows[name]['why']}", err=True)
        todo = [name for name in todo if name not in rows]
    return [rows[name] for name in names]


def families_table(report: dict) -> str:
    """The report as Markdown: a line per family."""
    lines = []
    for row in report["rows"]:
        ran = "worst" in row
        layers = f"{row['served']} of {row['whole']}" if ran else ""
        numbers = (f"{row['worst']:.0e}", f"{row['bf16']:.2f}") if ran else ("", "")
        lines.append([row["family"], row.get("class", ""), row["result"], layers, *numbers, row["why"]])
    head = ["family", "class", "result", "full layers served", "worst error", "bf16 error / its own", "why"]
    counts = {result: sum(row["result"] == result for row in report["rows"]) for result in RESULTS}
    said = ", ".join(f"{count} {result}" for result, count in counts.items() if count)
    return f"transformers {report['transformers']}, torch {report['torch']}: {said}\n\n{markdown(head, lines)}"
