"""Makes tests/golden/logits: tiny seeded random models, and what Hugging Face Transformers computes with them.

    python make_logits.py        (needs torch and transformers 5)

Each folder `logits/<case>` is a checkpoint (config.json, safetensors) and `golden.safetensors` with `input_ids`,
int32 `[tokens]`, and `logits`, float32 `[tokens, vocab]`: teacher-forced, float32 arithmetic, eager attention, with
the weights as they are stored. `rope.json` has the rotary frequencies of configurations as they are found on the hub.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OUT = Path(__file__).parent / "logits"
TOKENS = 40

COMMON = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=None,
)

LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN_ROPE = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=500.0, factor=2.0)

# name: model type, settings, and how it is stored: dtype, bytes per shard, form of config.json
CASES = {
    "llama": ("llama", dict(), dict()),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True), dict(transformers_4=True)),
    "llama_rope_llama3": ("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE), dict(transformers_4=True)),
    "llama_rope_yarn": ("llama", dict(tie_word_embeddings=True, rope_parameters=YARN_ROPE), dict()),
    "llama_rope_linear": ("llama", dict(tie_word_embeddings=True, rope_parameters=LINEAR_ROPE), dict(transformers_4=True)),
    "llama_sharded_f16": ("llama", dict(num_key_value_heads=1), dict(dtype=torch.float16, shard="40KB")),
    "mistral_window": ("mistral", dict(sliding_window=11), dict()),
    "qwen2_window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True),
        dict(transformers_4=True),
    ),
    "qwen3": ("qwen3", dict(head_dim=32, tie_word_embeddings=True), dict()),
}

ROPES = {
    "llama-3.1-8b": dict(
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "llama-3.2-1b": dict(
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "qwen2.5-yarn": dict(
        head_dim=128,
        max_position_embeddings=32768,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1000000.0, factor=4.0, original_max_position_embeddings=32768
        ),
    ),
    "yarn-mscale": dict(
        head_dim=64,
        max_position_embeddings=163840,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=10000.0,
            factor=40.0,
            original_max_position_embeddings=4096,
            beta_fast=32,
            beta_slow=1,
            mscale=1.0,
            mscale_all_dim=0.8,
        ),
    ),
    "yarn-untruncated": dict(
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=150000.0,
            factor=32.0,
            original_max_position_embeddings=4096,
            truncate=False,
            attention_factor=1.25,
        ),
    ),
    "linear": dict(
        head_dim=128,
        max_position_embeddings=16384,
        rope_parameters=dict(rope_type="linear", rope_theta=100000.0, factor=4.0),
    ),
    "dynamic": dict(
        head_dim=96,
        max_position_embeddings=4096,
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
    ),
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part matter: sharp attention, norms and biases that are no identity, logits of about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            value = 0.1 * noise
        else:
            value = 1.5 * parameter.shape[1] ** -0.5 * noise
        parameter.data.copy_(value.bfloat16())


def as_transformers_4(path: Path) -> None:
    """Rewrites a config.json to the fields that Transformers 4 knows."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "linear":
        config["rope_scaling"]["type"] = rope.pop("rope_type")
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_case(name: str, seed: int) -> None:
    model_type, settings, storage = CASES[name]
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    model.to(storage.get("dtype", torch.bfloat16)).save_pretrained(folder, max_shard_size=storage.get("shard", "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if storage.get("transformers_4"):
        as_transformers_4(folder / "config.json")

    # What is compared is what the files say, read back.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    save_file({"input_ids": ids.int(), "logits": logits}, folder / "golden.safetensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size // 1024} KiB, logits {logits.std():.2f} +- around {logits.mean():.2f}")


def make_ropes() -> None:
    ropes = {}
    for name, settings in ROPES.items():
        config = AutoConfig.for_model("llama", **{**COMMON, **settings})
        kind = settings["rope_parameters"]["rope_type"]
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        ropes[name] = dict(config=settings, inv_freq=inv_freq.tolist(), factor=factor)
    lines = [f"  {json.dumps(name)}: {json.dumps(rope)}" for name, rope in ropes.items()]
    (OUT / "rope.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    make_ropes()
    for seed, name in enumerate(CASES):
        make_case(name, seed)
