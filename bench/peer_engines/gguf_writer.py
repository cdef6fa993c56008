"""A checkpoint of Hugging Face's kind as the single GGUF file that llama.cpp reads, matrices in bfloat16 as they are.

    python -m bench.peer_engines.gguf_writer FOLDER FILE

Only for the architectures that the benchmark makes. The file has no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors file, bfloat16 in the bits of uint16."""

    name: str
    bits: np.ndarray[Any, np.dtype[np.uint16]]

    def as_float32(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Exact: bfloat16 is the upper half of a float32."""
        return (self.bits.astype(np.uint32) << 16).view(np.float32)


def read_tensors(path: Path) -> Iterator[Tensor]:
    """All tensors of a safetensors file: an 8-byte length, a JSON header, the bytes.

    Raises:
        ValueError: one is not in bfloat16.
    """
    content = np.memmap(path, dtype=np.uint8, mode="r")
    begin = 8 + int(content[:8].view(np.uint64)[0])
    for name, entry in json.loads(content[8:begin].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}; only BF16 checkpoints are converted")
        start, end = entry["data_offsets"]
        bits = content[begin + start : begin + end].view(np.uint16)
        yield Tensor(name, bits.reshape(entry["shape"]))


def pair_neighbours(bits: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows `[num_heads * head_dim, hidden]` in the order of llama.cpp's RoPE for Llama.

    It rotates neighbouring rows of a head, where transformers rotates row i with row i + head_dim / 2.
    """
    halves = bits.reshape(num_heads, 2, -1, bits.shape[1])
    return halves.swapaxes(1, 2).reshape(bits.shape)


def describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The hyperparameters."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_tensor(writer: gguf.GGUFWriter, tensor: Tensor, name: str, paired: dict[str, int]) -> None:
    """A matrix as it is, a norm or bias in float32; `paired`: heads of layers whose rows change places."""
    if tensor.bits.ndim == 1:
        writer.add_tensor(name, tensor.as_float32())
        return
    module = tensor.name.removesuffix(".weight").rpartition(".")[2]
    num_heads = paired.get(module)
    bits = pair_neighbours(tensor.bits, num_heads) if num_heads else tensor.bits
    data = np.ascontiguousarray(bits).view(np.uint8)
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)


def main(arguments: Sequence[str]) -> None:
    """Write the file, whole or not at all."""
    folder, target = Path(arguments[0]), Path(arguments[1])
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[architecture])
    describe(writer, config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    paired = heads if architecture is gguf.MODEL_ARCH.LLAMA else {}
    for tensor in read_tensors(folder / "model.safetensors"):
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        assert name is not None, tensor.name
        add_tensor(writer, tensor, name, paired)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)


if __name__ == "__main__":
    main(sys.argv[1:])
