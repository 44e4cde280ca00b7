"""Times a vision-language model of transformers on torch, with random weights: first token, decode
step, memory and power.

    python examples/bench_peer.py --config config.json --visual 576 --batch 1 8

`quota-jax bench --peer transformers` runs it and sets the rows beside its own. The configuration is
a Hugging Face config.json of LLaVA or Qwen2.5-VL; weights are made on the device. Attention is
torch's scaled_dot_product_attention; decoding is eager, by a loop of forward passes around the
growing cache (without what `generate` adds around it). Prints one JSON object for each batch size.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from quota_jax.reproduce.power import PowerMeter

POWER_SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a Hugging Face config.json")
    parser.add_argument("--visual", type=int, required=True, help="visual tokens of the picture")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--text", type=int, default=64, help="text tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch sees no CUDA device")
    with torch.inference_mode():
        model, load = random_model(options.config, options.device, options.dtype)
        for size in options.batch:
            row = measure(
                model,
                batch_size=size,
                visual=options.visual,
                text=options.text,
                new=options.new,
                repeats=options.repeats,
            )
            label = f"transformers {'bf16' if options.dtype == 'bfloat16' else options.dtype}"
            print(json.dumps({"label": label, "load": load, **row}), flush=True)


def random_model(file: Path, device: str, dtype: str) -> tuple[Any, float]:
    """The model of a configuration file, and the seconds to make it."""
    values = json.loads(file.read_text())
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    begun = time.perf_counter()
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    model = model.eval()
    wait(model.device)
    return model, time.perf_counter() - begun


def prompts(model: Any, batch_size: int, visual: int, text: int) -> dict[str, torch.Tensor]:
    """Inputs on the host: one picture of random pixels among random text in each prompt."""
    config, draw = model.config, torch.Generator().manual_seed(0)
    image = config.image_token_id
    below = min(image, config.text_config.vocab_size)
    ids = torch.randint(0, below, (batch_size, text + visual), generator=draw)
    ids[:, 4 : 4 + visual] = image
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vision = config.vision_config
    if config.model_type == "qwen2_5_vl":
        side = round(visual**0.5) * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        shape = (batch_size * side * side, values)
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * batch_size)
        inputs["mm_token_type_ids"] = (ids == image).long()
    else:
        shape = (batch_size, vision.num_channels, vision.image_size, vision.image_size)
    return inputs | {"pixel_values": torch.randn(shape, generator=draw).to(model.dtype)}


def measure(
    model: Any, *, batch_size: int, visual: int, text: int, new: int, repeats: int
) -> dict[str, Any]:
    """Medians of warm runs, in seconds: pixels on the host to first tokens on the host, and one
    decode step of the whole batch."""
    device, host = model.device, prompts(model, batch_size, visual, text)
    if device.type == "cuda":
        host = {name: array.pin_memory() for name, array in host.items()}
        torch.cuda.reset_peak_memory_stats()

    def first() -> Any:
        inputs = {name: array.to(device, non_blocking=True) for name, array in host.items()}
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        token.cpu()
        return out[cache_name(model)], token

    def decode() -> tuple[float, Any]:
        cache, token = first()
        wait(device)
        begun = time.perf_counter()
        cache = steps(model, cache, token, new)
        return time.perf_counter() - begun, cache

    first()
    _, cache = decode()
    cache_bytes = sum(a.nbytes for layer in cache.layers for a in (layer.keys, layer.values))
    del cache
    firsts = []
    for _ in range(repeats):
        begun = time.perf_counter()
        first()
        firsts.append(time.perf_counter() - begun)
    step = statistics.median(decode()[0] for _ in range(max(2, repeats // 2))) / new
    watts, joules = power(model, first, new, batch_size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "device": name,
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "batch_size": batch_size,
        "visual_tokens": visual,
        "text_tokens": text,
        "new_tokens": new,
        "first_token": statistics.median(firsts),
        "decode_step": step,
        "weight_bytes": sum(each.nbytes for each in model.parameters()),
        "cache_bytes": cache_bytes,
        "peak_bytes": peak,
        "watts": watts,
        "joules_per_token": joules,
    }


def steps(model: Any, cache: Any, token: torch.Tensor, count: int) -> Any:
    """``count`` greedy steps, to the last token on the host."""
    name = cache_name(model)
    for _ in range(count):
        out = model(input_ids=token, use_cache=True, logits_to_keep=1, **{name: cache})
        cache, token = out[name], out.logits[:, -1:].argmax(-1)
    token.cpu()
    return cache


def cache_name(model: Any) -> str:
    """What this version of transformers calls keys and values: releases of 5 differ in it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def power(model: Any, first: Any, new: int, batch_size: int) -> tuple[float | None, float | None]:
    """Mean watts of decoding, by the GPU's energy counter, and joules per token of a sample; None
    without such a counter. Decodes on from one prompt, so that no prefill counts, and no less than
    POWER_SECONDS, because the counter is slow."""
    meter = PowerMeter.open_number(0) if model.device.type == "cuda" else None
    if meter is None or meter.joules() is None:
        return None, None
    cache, token = first()
    before, begun, count = meter.joules(), time.perf_counter(), 0
    while time.perf_counter() - begun < POWER_SECONDS:
        cache = steps(model, cache, token, new)
        cache.crop(-new)  # takes this many tokens away again
        count += new * batch_size
    seconds, after = time.perf_counter() - begun, meter.joules()
    assert before is not None
    assert after is not None
    return (after - before) / seconds, (after - before) / count


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
