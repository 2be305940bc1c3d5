#!/usr/bin/env python3
"""Load a checkpoint that mxconvert wrote (--layout compressed-tensors) in Transformers, and compare.

  python tests/transformers_check.py --model DIR [--server http://127.0.0.1:8000] [--tokens N] [--tolerance T]

1. Every dequantized weight in Transformers equals, bit for bit, what the packed bytes say (decoded here from the
   format's definition).
2. The logits over a prompt are finite.
3. With --server (an mxserve of the same folder, with --kv-cache-dtype f32, as Transformers computes here): the
   log-probabilities of the prompt's tokens, from /v1/completions with echo, agree with Transformers' within the
   tolerance. A BF16 cache, the server's default, differs by some 0.02.

Needs torch, transformers, compressed-tensors >= 0.20 and safetensors. Not part of the test suite: run by hand.
"""
import argparse
import json
import pathlib
import sys
import urllib.request

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def float_values(exponent_bits, mantissa_bits, bias):
    """Value of every code of a sign-magnitude element type without specials."""
    bits = 1 + exponent_bits + mantissa_bits
    values = []
    for code in range(1 << bits):
        sign = -1.0 if code >> (bits - 1) else 1.0
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        fraction = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        values.append(sign * 2.0 ** (max(exponent, 1) - bias) * ((exponent > 0) + fraction))
    return torch.tensor(values, dtype=torch.float64)


def unpack(packed, bits):
    """U8 [N, K * bits / 8], a little-endian bit stream per row -> codes [N, K]."""
    b = packed.to(torch.int64)
    if bits == 4:
        return torch.stack([b & 15, b >> 4], -1).flatten(1)
    b0, b1, b2 = b.unflatten(1, (-1, 3)).unbind(-1)
    word = b0 | b1 << 8 | b2 << 16
    return torch.stack([(word >> shift) & 63 for shift in (0, 6, 12, 18)], -1).flatten(1)


def decode(codes, scales):
    """A packed weight's values in float64, by the OCP definition: element times 2^(scale byte - 127)."""
    if codes.dtype == torch.uint8:
        bits = 8 * codes.shape[1] // (32 * scales.shape[1])
        table = {4: float_values(2, 1, 1), 6: float_values(2, 3, 1)}[bits]
        elements = table[unpack(codes, bits)]
    else:
        elements = codes.to(torch.float64)
    factor = torch.exp2(scales.to(torch.float64) - 127)
    return (elements.unflatten(1, (-1, 32)) * factor.unsqueeze(-1)).flatten(1)


def packed_weights(folder):
    """(module, codes, scales) of every quantized linear module."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    for name, scales in tensors.items():
        if name.endswith(".weight_scale"):
            module = name.removesuffix(".weight_scale")
            codes = tensors.get(f"{module}.weight_packed", tensors.get(f"{module}.weight"))
            yield module, codes, scales


def check_weights(model, folder):
    """Exact comparison of every quantized weight; returns how many there were."""
    count = 0
    for module, codes, scales in packed_weights(folder):
        expected = decode(codes, scales)
        actual = model.get_submodule(module).weight.detach().to(torch.float64)
        if actual.shape != expected.shape or not torch.equal(actual, expected):
            sys.exit(f"{module}: the dequantized weight differs")
        count += 1
    return count


def server_logprobs(url, ids):
    """Log-probabilities of ids[1:] given what comes before, from the server."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        name = json.load(answer)["data"][0]["id"]
    body = {"model": name, "prompt": [ids], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        logprobs = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
    return torch.tensor(logprobs[1 : len(ids)], dtype=torch.float64)


def main():
    """Runs the checks; the exit status is the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--server")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of a log-probability")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, args.tokens), generator=generator)
    with torch.no_grad():
        # Modules are decompressed when they are first used, to BF16: exact for MX weights.
        model(ids)
        logits = torch.nn.Module.float(model)(ids).logits[0].to(torch.float64)
    if not torch.isfinite(logits).all():
        sys.exit("logits are not finite")
    count = check_weights(model, args.model)
    if count == 0:
        sys.exit(f"{args.model} holds no packed weights")
    print(f"{count} dequantized weights are exactly equal, logits are finite")
    if args.server:
        expected = torch.log_softmax(logits, -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        worst = (server_logprobs(args.server.rstrip("/"), ids[0].tolist()) - expected).abs().max().item()
        print(f"largest difference of a log-probability to the server: {worst:.1e}")
        if not worst <= args.tolerance:
            sys.exit(f"that is more than {args.tolerance}")


if __name__ == "__main__":
    main()
