import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from tiny_gguf import CONFIG, hf_tensors, write_gguf

from pe_rlhf_jax.checkpoint import gguf as gguf_module
from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.weights import WeightsError


def test_every_tensor_and_the_configuration_come_back_in_hugging_face_terms(tmp_path):
    tensors = hf_tensors()
    write_gguf(tmp_path / "m.gguf", tensors)
    file = GGUFFile(tmp_path / "m.gguf")
    assert {k: file.config[k] for k in CONFIG} == CONFIG
    assert file.eos_token_ids == (2,)
    assert set(file.names) == set(tensors)
    for name, tensor in tensors.items():
        assert file.shape(name) == tensor.shape
        read = file.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, tensor, err_msg=name)


def test_a_head_of_its_own_means_untied(tmp_path):
    write_gguf(tmp_path / "m.gguf", hf_tensors(tied=False))
    assert GGUFFile(tmp_path / "m.gguf").config["tie_word_embeddings"] is False


def test_what_a_file_may_leave_out_has_llama_cpps_defaults(tmp_path):
    left_out = ("llama.rope.freq_base", "llama.rope.dimension_count", "llama.attention.head_count_kv", "tokenizer.ggml.eos_token_id")
    write_gguf(tmp_path / "m.gguf", hf_tensors(), drop=left_out)
    file = GGUFFile(tmp_path / "m.gguf")
    assert (file.config["rope_theta"], file.config["head_dim"], file.config["num_key_value_heads"]) == (10_000.0, 16, 4)
    assert file.eos_token_ids == ()


@pytest.mark.parametrize(
    ("kind", "levels"),
    [("F16", 2**11), ("BF16", 2**8), ("Q8_0", 127), ("Q5_0", 15), ("Q5_1", 15.5), ("Q4_0", 7), ("Q4_1", 7.5)],
)
def test_quantized_matrices_are_within_one_step_of_what_was_stored(tmp_path, kind, levels):
    tensors = hf_tensors()
    write_gguf(tmp_path / "m.gguf", tensors, getattr(Quant, kind))
    file = GGUFFile(tmp_path / "m.gguf")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        blocks, read = (x.reshape(-1, 32) for x in (tensors[name], file.read(name)))
        # One step, where half a step is the rounding and the asymmetric end of the symmetric types takes up to one.
        step = np.abs(blocks).max(-1, keepdims=True) / levels
        assert (np.abs(read - blocks) <= step * 1.02).all()
        assert np.abs(read - blocks).max() > 0


def _k_quant(kind, block):
    """One block of 256 weights after the layout comments of ggml's block_q4_K, block_q5_K and block_q6_K, one weight at a
    time."""
    out = []
    if kind == "Q6_K":
        low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
        (d,) = struct.unpack("<e", block[208:210])
        for n in range(256):
            half, quarter, i = n // 128, n % 128 // 32, n % 32
            four = low[64 * half + 32 * (quarter % 2) + i] >> (4 * (quarter // 2)) & 15
            two = high[32 * half + i] >> (2 * quarter) & 3
            out.append(d * int(scales[n // 16]) * ((four | two << 4) - 32))
        return out
    d, dmin = struct.unpack("<ee", block[:4])
    s = block[4:16]
    high, low = (block[16:48], block[48:176]) if kind == "Q5_K" else (bytes(32), block[16:144])
    for n in range(256):
        j, i = n // 32, n % 32
        if j < 4:
            scale, least = s[j] & 63, s[j + 4] & 63
        else:
            scale, least = s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4
        level = (low[32 * (j // 2) + i] >> (4 * (j % 2)) & 15) | (high[i] >> j & 1) << 4
        out.append(d * scale * level - dmin * least)
    return out


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_decode_as_ggml_lays_them_out(tmp_path, kind):
    size = gguf.GGML_QUANT_SIZES[Quant[kind]][1]
    blocks = np.random.default_rng(0).integers(0, 256, (3, size), dtype=np.uint8)
    halves = np.frombuffer(np.array([0.013, 0.007], "<f2").tobytes(), np.uint8)
    blocks[:, slice(-2, None) if kind == "Q6_K" else slice(4)] = halves[: 2 if kind == "Q6_K" else 4]
    write_gguf(tmp_path / "m.gguf", hf_tensors(), extra={"extra.weight": (blocks, Quant[kind])})
    expected = np.array([_k_quant(kind, block.tobytes()) for block in blocks], np.float32)
    np.testing.assert_allclose(GGUFFile(tmp_path / "m.gguf").read("extra.weight"), expected, rtol=1e-5, atol=1e-6)


def test_other_tensor_types_and_architectures_are_refused_by_name(tmp_path):
    write_gguf(tmp_path / "a.gguf", hf_tensors(), extra={"odd.weight": (np.zeros((1, 84), np.uint8), Quant.Q2_K)})
    with pytest.raises(WeightsError, match=r"odd.weight is of type Q2_K.*supported: F32"):
        GGUFFile(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", hf_tensors(), metadata={"general.architecture": "mamba"})
    with pytest.raises(WeightsError, match="architecture 'mamba' is not supported"):
        GGUFFile(tmp_path / "b.gguf")


def test_rope_factors_of_one_change_nothing_and_others_are_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", hf_tensors(), extra={"rope_freqs.weight": (np.ones(8, np.float32), Quant.F32)})
    file = GGUFFile(tmp_path / "m.gguf")
    assert "rope_scaling" not in file.config
    assert "rope_freqs.weight" not in file.names
    write_gguf(tmp_path / "m.gguf", hf_tensors(), extra={"rope_freqs.weight": (np.full(8, 8.0, np.float32), Quant.F32)})
    with pytest.raises(WeightsError, match=r"rope_freqs.weight is not Llama 3's scaling"):
        GGUFFile(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, hf_tensors(), Quant.Q4_1)
    return path.read_bytes()


def _read_all(path):
    file = GGUFFile(path)
    return [file.read(name) for name in file.names]


def test_a_file_cut_anywhere_is_an_error_of_ours(tmp_path, whole):
    path = tmp_path / "cut.gguf"
    header = whole.index(b"blk.1.ffn_down")
    offsets = [0, 1, 3, 4, 7, 8, 20, 23, 24, *range(30, header, header // 40), *range(header, len(whole), 5001), len(whole) - 1]
    for offset in offsets:
        path.write_bytes(whole[:offset])
        with pytest.raises(WeightsError, match="not a whole GGUF file .*" + ("bytes are needed" if offset else "empty")):
            _read_all(path)


def test_flipped_bytes_never_escape_as_another_error_and_never_hang(tmp_path, whole):
    path = tmp_path / "flipped.gguf"
    rng = np.random.default_rng(0)
    structure = whole.index(b"tokenizer.ggml.tokens") + 60
    tensors = range(whole.index(b"token_embd.weight"), whole.index(b"blk.1.ffn_down.weight"))
    at = [*range(structure), *tensors]
    refused = 0
    for offset in rng.permutation(at)[:150]:
        damaged = bytearray(whole)
        damaged[offset] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            _read_all(path)
        except WeightsError:
            refused += 1
    assert refused > 50  # most of the structure matters; names and texts may still be readable


@pytest.mark.parametrize("count", [2**64 - 1, 2**62, 2**40, 2**31, 10_000_000])
def test_absurd_counts_are_refused_at_once(tmp_path, whole, count):
    path = tmp_path / "absurd.gguf"
    array = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    for offset in (8, 16, 24, array):  # tensors, values, length of the first key, length of an array
        path.write_bytes(whole[:offset] + struct.pack("<Q", count) + whole[offset + 8 :])
        with pytest.raises(WeightsError):
            GGUFFile(path)


def test_a_count_that_a_big_file_could_hold_is_bounded_too(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(gguf_module, "_MAX_HEADER_VALUES", 20_000)
    path = tmp_path / "long.gguf"
    array = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    path.write_bytes(whole[:array] + struct.pack("<Q", 30_000) + whole[array + 8 :] + bytes(200_000))
    with pytest.raises(WeightsError, match="more than 20000 values"):
        GGUFFile(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        GGUFFile(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("<html>not found</html>" * 99)
    with pytest.raises(WeightsError, match=r"magic.*fetch it again"):
        GGUFFile(tmp_path / "text.gguf")
