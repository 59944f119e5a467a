"""Hostile model folders: headers, indexes, configs, tokenizers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from moequant.families.base import Family
from tests.hostile import damage
from tests.hostile.attempts import Attempt, on_model
from tests.hostile.ground import Ground

INDEX = "model.safetensors.index.json"


def headers(random: Random, ground: Ground, folder: Path) -> Attempt:
    """The header of a safetensors file: its length, its JSON, its entries."""
    model = ground.copy("qwen3_moe", folder / "model")
    path = model / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = random.choice([key for key in header if key != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    draw = random.randrange(8)
    if draw == 0:
        path.write_bytes(damage.any_damage(random, content))
        return on_model(random, model, "bytes of the file")
    if draw == 1:
        lengths = [0, 1, length - 1, length + 1, len(content), 10**8 + 1, 2**63, 2**64 - 1]
        path.write_bytes(struct.pack("<Q", random.choice(lengths)) + content[8:])
        return on_model(random, model, "length of the header", True)
    if draw == 2:
        raw = damage.text(random, header)
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        return on_model(random, model, "text of the header")
    must = draw in (3, 4)
    if draw == 3:  # rules of the format that are broken
        header[name]["data_offsets"] = random.choice(
            [[end, begin], [begin, begin], [begin, end - 2], [begin, end + 2], [begin + 2, end + 2],
             [0, end - begin], [-2, end], [begin, 2**64], [begin], [begin, end, end], [float(begin), end]]
        )  # fmt: skip
        must = header[name]["data_offsets"] != [begin, end]
    elif draw == 4:
        header[name]["dtype"] = random.choice(["F32", "F64", "U8", "BF17", "", None, 7, ["BF16"], {}, "bf16"])
    elif draw == 5:
        header[name]["shape"] = damage.odd(random, header[name]["shape"])
    elif draw == 6:
        header = damage.change(random, header, random.randrange(1, 4))
    else:
        header[str(damage.odd(random, name)) if random.random() < 0.3 else f"{name}\n\x1b[31m"] = header.pop(
            name
        )
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return on_model(random, model, f"header entry {name}, way {draw}", must)


def indexes(random: Random, ground: Ground, folder: Path) -> Attempt:
    """model.safetensors.index.json: its JSON, and names that lead elsewhere."""
    model = ground.copy("mixtral", folder / "model")
    path = model / INDEX
    index = json.loads(path.read_text())
    if random.random() < 0.4:
        name = "model.embed_tokens.weight"
        outside = ground.bait / "model.safetensors"
        index["weight_map"][name] = random.choice(
            [str(outside), f"../{'../' * 12}{str(outside)[1:]}", f"sub/../{outside.name}", "a\0b.safetensors",
             "/dev/zero", "", None, 3, ["a"], "x" * 300 + ".safetensors", ".", "..", "config.json"]
        )  # fmt: skip
        path.write_text(json.dumps(index))
        return on_model(random, model, f"shard {index['weight_map'][name]!r}", True)
    raw = damage.text(random, index) if random.random() < 0.3 else None
    path.write_bytes(raw if raw is not None else json.dumps(damage.change(random, index, 2)).encode())
    return on_model(random, model, "index")


def configs(random: Random, ground: Ground, folder: Path) -> Attempt:
    """config.json: values of every kind under every key, given or known to the class."""
    name = random.choice(list(ground.models))
    model = ground.copy(name, folder / "model")
    path = model / "config.json"
    config = json.loads(path.read_text())
    draw = random.random()
    if draw < 0.1:
        path.write_bytes(damage.text(random, config))
        return on_model(random, model, "text of config.json")
    if draw < 0.55:  # one key that the family knows
        key = random.choice(sorted(_family(config).known | config.keys()))
        config[key] = damage.odd(random, config.get(key))
        what = f"{name}: {key} = {config[key]!r:.60}"
    elif draw < 0.7:
        key, value = random.choice(_nested(config))
        config[key] = value if random.random() < 0.4 else damage.change(random, {key: value}, 2).get(key)
        what = f"{name}: {key} = {config[key]!r:.200}"
    else:
        changed = damage.change(random, config, random.randrange(1, 4))
        what = f"{name}: " + str({k: v for k, v in changed.items() if config.get(k) != v})[:200]
        config = changed
    path.write_text(json.dumps(config))
    return on_model(random, model, what)


def families(random: Random, ground: Ground, folder: Path) -> Attempt:
    """Configs of families of other kinds: latent attention, recurrent layers, flat experts, vision towers."""
    name = random.choice(sorted(ground.others))
    model = ground.copy(name, folder / "model")
    path = model / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    if random.random() < 0.6:
        key = random.choice(sorted(_family(config).known | text.keys()))
        text[key] = damage.odd(random, text.get(key))
        what = f"{key} = {text[key]!r:.80}"
    else:
        under = random.choice([(), ("text_config",), ("rope_parameters",), ("ffn_config",), ("attn_config",),
                               ("layer_types",), ("layers_block_type",), ("vision_config",)])  # fmt: skip
        config = damage.change(random, config, random.randrange(1, 4), under)
        what = f"changed under {under}"
    path.write_text(json.dumps(config))
    if random.random() < 0.6:
        return Attempt(["inspect", str(model), *random.choice([[], ["--json"]])], f"{name}: {what}")
    return on_model(random, model, f"{name}: {what}")


def _family(config: dict[str, Any]) -> Family:
    from moequant import families

    return families.find(config)


def _nested(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """Keys whose values are objects or lists, as releases have them."""
    return [
        ("rope_parameters", config.get("rope_parameters") or {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["sliding_attention"] * 3),
        ("architectures", config["architectures"]),
        ("text_config", dict(config)),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
        ("quantization_config", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
        ("quantization_config", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
        ("quantization_config", {"quant_method": "compressed-tensors", "format": "pack-quantized",
                                 "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                                     "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}}}),
    ]  # fmt: skip


def tokenizers(random: Random, ground: Ground, folder: Path) -> Attempt:
    """tokenizer.json, tokenizer_config.json, tokenizer.model and the files beside them."""
    model = ground.copy("qwen3_moe", folder / "model")
    draw = random.randrange(6)
    if draw <= 2:
        path = model / ("tokenizer.json" if draw < 2 else "tokenizer_config.json")
        document = json.loads(path.read_text())
        under = (random.choice(["model", "pre_tokenizer", "added_tokens", "decoder", "normalizer"]),)
        under = under if draw == 1 and document.get(under[0]) else ()
        raw = damage.text(random, document) if random.random() < 0.15 else None
        changed = damage.change(random, document, random.randrange(1, 3), under)
        path.write_bytes(raw if raw is not None else json.dumps(changed).encode())
        return on_model(random, model, f"{path.name} {under}")
    if draw == 3:
        (model / "tokenizer.json").unlink()
        (model / "tokenizer.model").write_bytes(_sentencepiece(random))
        return on_model(random, model, "tokenizer.model")
    if draw == 4:
        path = model / "tokenizer_config.json"
        key = random.choice(
            ["chat_template", "add_bos_token", "bos_token", "eos_token", "pad_token", "added_tokens_decoder",
             "model_max_length", "tokenizer_class", "extra_special_tokens", "additional_special_tokens"]
        )  # fmt: skip
        tokens = {"0": {"content": damage.odd(random, "<s>"), "special": damage.odd(random, True)}}
        value = random.choice(
            [damage.odd(random), tokens, "{% for x in range(10**12) %}{{ x }}{% endfor %}",
             [{"name": damage.odd(random), "template": damage.odd(random)}], {"content": damage.odd(random)}]
        )  # fmt: skip
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        return on_model(random, model, f"{key} = {value!r:.100}")
    name = random.choice(["generation_config.json", "special_tokens_map.json", "chat_template.jinja",
                          "chat_template.json", "vocab.json", "merges.txt", "added_tokens.json"])  # fmt: skip
    document = {
        "eos_token_id": damage.odd(random),
        "eos_token": damage.odd(random),
        "<s>": damage.odd(random),
    }
    content = [
        damage.text(random, document),
        json.dumps(document).encode(),
        random.randbytes(300),
        b"{{" * 500,
    ]
    (model / name).write_bytes(random.choice(content))
    return on_model(random, model, name)


def _sentencepiece(random: Random) -> bytes:
    """A SentencePiece model: pieces as protobuf, with damage."""

    def field(number: int, content: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(content)) + content

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        *(f"\u2581w{n}" for n in range(50)),
    ]
    if random.random() < 0.2:
        pieces.append("a" * 50_000)
    kinds = {0: 2, 1: 3, 2: 3}
    content = b"".join(
        field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", -n) + b"\x18"
              + bytes([kinds.get(n, 6 if piece.startswith("<0x") else 1)]))
        for n, piece in enumerate(pieces)
    )  # fmt: skip
    content += field(2, b"\x18" + bytes([random.choice([0, 1, 2, 3, 4, 99])]))
    return content if random.random() < 0.3 else damage.any_damage(random, content)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
