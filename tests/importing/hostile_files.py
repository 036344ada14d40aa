"""Hostile files, each of one kind that would keep a careless reader busy: written by hand, never executed."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable

import numpy as np
import torch
from foreign_files import Persistent, stand_ins, torch_bytes

from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config

SIZE = 10_000_000  # bytes
HASH_MODULUS = 2**61 - 1  # Python's hash of an integer is its remainder


def _text(words: str | bytes) -> bytes:
    content = words.encode() if isinstance(words, str) else words
    return b"X" + struct.pack("<I", len(content)) + content


def _bytes(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


def _long(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def _crowded(count: int) -> list[int]:
    """Integers, each found in a dictionary only after a long row of occupied places.

    CPython looks at place 5 p + h + 1 (mod table size) next, where h is the hash, shifted right by five bits each time.
    Once h is used up, every search follows one row. The first keys fill half of it; the others are those that meet
    occupied places until then.
    """
    mask = 2**18 - 1
    row = [0]
    for _ in range(2**17):
        row.append((5 * row[-1] + 1) & mask)
    taken = np.zeros(mask + 1, dtype=bool)
    taken[row] = True
    keys = np.random.default_rng(1).integers(2**35, 2**40, size=300 * count)
    place, rest = keys & mask, keys.copy()
    for _ in range(8):
        keep = taken[place]
        keys, place, rest = keys[keep], place[keep], rest[keep] >> 5
        place = (5 * place + rest + 1) & mask
    return [*row, *keys[:count].tolist()]


def many_instructions() -> bytes:
    return b"\x80\x02" + b"N0" * (SIZE // 2) + b"N."


def memo_of_equal_hashes() -> bytes:
    """Every place of the memo has the same hash."""
    return b"\x80\x02N" + b"".join(b"p%d\n" % (place * HASH_MODULUS) for place in range(1, 100_000)) + b"."


def keys_of_crowded_places() -> bytes:
    return b"\x80\x02}(" + b"".join(_long(key) + b"N" for key in _crowded(15_000)) + b"u."


def long_equal_keys() -> bytes:
    """Two equal texts of 5 MB: whenever one is looked up, it is compared with the other."""
    words = b"k" * (SIZE // 2 - 200_000)
    repeated = b"(" + b"h\x01N" * 100_000 + b"u"
    return b"\x80\x02}" + _text(words) + b"q\x00Ns" + _text(words) + b"q\x010" + repeated + b"."


def long_equal_storage_names() -> bytes:
    words = b"k" * (SIZE // 2 - 200_000)
    ids = b"".join(
        b"(X\x07\x00\x00\x00storageh\x02h"
        + (b"\x00" if place == 0 else b"\x01")
        + b"X\x03\x00\x00\x00cpuK\x00tQ0"
        for place in range(30_000)
    )
    start = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}"
    start += _text("little_endian") + b"\x88s.\x80\x02"
    return (
        start + _text(words) + b"q\x000" + _text(words) + b"q\x010ctorch\nFloatStorage\nq\x020" + ids + b"N."
    )


def long_dtypes() -> bytes:
    words = b"<" * (SIZE - 400_000) + b"f4"
    return b"\x80\x02" + _text(words) + b"q\x000cnumpy\ndtype\nq\x010" + b"h\x01h\x00\x85R0" * 50_000 + b"N."


def long_texts_encoded() -> bytes:
    call = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0"
    return b"\x80\x02" + _text(b"k" * (SIZE - 2_000_000)) + b"q\x000" + call * 50_000 + b"N."


def one_list_made_a_dictionary_again_and_again() -> bytes:
    pairs = b"](" + b"K\x00N\x86" * 50_000 + b"eq\x000"
    return b"\x80\x02" + pairs + b"ccollections\nOrderedDict\nh\x00\x85R0" * 40_000 + b"N."


def _older_storage(before: bytes = b"") -> bytes:
    """One number as the older format of torch.save, each pickle of which begins with these instructions."""
    start = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02" + before + b"}"
    start += _text("little_endian") + b"\x88s."
    identifier = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01NtQ."
    )
    return (
        start
        + b"\x80\x02"
        + before
        + identifier
        + b"\x80\x02"
        + before
        + b"]X\x01\x00\x00\x000a."
        + struct.pack("<qf", 1, 0)
    )


def storages_with_long_pickles() -> bytes:
    """Each of 3,000 storages is a pickle of 27,000 instructions, all one text of the file."""
    inner = _older_storage(b"N0" * 4500)
    call = b"ctorch.storage\n_load_from_bytes\nh\x00\x85R0"
    return b"\x80\x03" + _bytes(inner) + b"q\x000" + call * (SIZE // len(inner) * 3) + b" " * (SIZE - 10**6)


def an_older_checkpoint_of_long_pickles() -> bytes:
    return _older_storage(b"N0" * 140_000)


def nested_tuples() -> bytes:
    return b"\x80\x02N" + b"\x85" * SIZE + b"."


def nested_calls() -> bytes:
    return b"\x80\x02" + b"cargparse\nNamespace\n" * 70_000 + b")R" + b"\x85R" * 69_999 + b"."


def lists_of_lists_ten_times_each() -> bytes:
    return (
        b"\x80\x04]\x94"
        + b"".join(b"](" + (b"h" + bytes([place])) * 10 + b"e\x94" for place in range(250))
        + b"."
    )


def modules_within_modules() -> bytes:
    with stand_ins():
        inner = Persistent("Part", {"_modules": {}})
        for _ in range(30):
            inner = Persistent("Part", {"_modules": {"a": inner, "b": inner}})
        return pickle.dumps({"G_ema": inner}, 3)


def one_tensor_under_many_names() -> bytes:
    storage = _older_storage()
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\n" + _bytes(storage)
    tensor += b"\x85RK\x00K\x01\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRq\x000"
    names = b"".join(_text(f"a{place}") + b"h\x00" for place in range(140_000))
    return b"\x80\x03" + tensor + b"}(" + names + b"u."


def one_network_under_many_names() -> bytes:
    part = b"}(" + b"".join(_text(f"b{place}") + b"N" for place in range(70_000)) + b"uq\x000"
    return b"\x80\x03" + part + b"}(" + b"".join(_text(f"a{i}") + b"h\x00" for i in range(70_000)) + b"u."


def many_filters() -> bytes:
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(row, row)
    names = {f"a{place}.resample_filter": kernel for place in range(4000)}
    return torch_bytes({"G_ema": {"synthesis.b4.const": torch.zeros(4, 4), **names}})


def many_mapping_layers() -> bytes:
    config = StyleGAN2Config(
        size=8, latent_width=1, style_width=1, channel_base=8, channel_max=1, mapping_layers=1
    )
    tensors = dict(StyleGAN2(config, torch.Generator()).state_dict())
    del tensors["mapping.w_avg"]
    weight, bias = torch.ones(1, 1), torch.zeros(1)
    for place in range(1, 600):
        tensors |= {f"mapping.fc{place}.weight": weight, f"mapping.fc{place}.bias": bias}
    return torch_bytes({"G_ema": tensors})


def many_classes() -> bytes:
    """A mean style over 65,536 classes, which the file does not have, would be estimated from large matrices."""
    config = StyleGAN2Config(
        size=8, latent_width=1, style_width=1, channel_base=8, channel_max=1, classes=65536
    )
    tensors = dict(StyleGAN2(config, torch.Generator()).state_dict())
    del tensors["mapping.w_avg"]
    return torch_bytes({"G_ema": tensors})


def long_numbers() -> bytes:
    return b"\x80\x02F" + b"1" * (SIZE // 2) + b"\n0F." + b"0" * (SIZE // 2) + b"1\n0N."


def long_decimal_integers() -> bytes:
    return b"\x80\x02" + (b"I" + b"7" * 4299 + b"\n0") * (SIZE // 4302) + b"N."


def a_long_decimal_integer() -> bytes:
    return b"\x80\x02L" + b"7" * SIZE + b"L\n."


def a_long_binary_integer() -> bytes:
    return b"\x80\x02\x8b" + struct.pack("<i", SIZE) + b"\x77" * SIZE + b"."


def escaped_text() -> bytes:
    return b"\x80\x02S'" + b"\\x41" * (SIZE // 8) + b"'\n0V" + b"\\u0041" * (SIZE // 12) + b"\n."


def a_long_name_of_a_class() -> bytes:
    return b"\x80\x02c" + b"os" * (SIZE // 2) + b"\nsystem\n."


def marks() -> bytes:
    return b"\x80\x02" + b"(" * 149_000 + b"1" * 149_000 + b"N."


def many_parts_of_an_archive() -> bytes:
    name = b"x/%05d"
    entries = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0)
        + name % place
        for place in range(75_000)
    )
    return (
        b"PK\x03\x04" + bytes(26) + entries
        + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, len(entries), 30, 0)
    )  # fmt: skip


KINDS: dict[str, Callable[[], bytes]] = {
    made.__name__: made
    for made in (
        many_instructions, memo_of_equal_hashes, keys_of_crowded_places, long_equal_keys,
        long_equal_storage_names, long_dtypes, long_texts_encoded, one_list_made_a_dictionary_again_and_again,
        storages_with_long_pickles, an_older_checkpoint_of_long_pickles, nested_tuples, nested_calls,
        lists_of_lists_ten_times_each, modules_within_modules, one_tensor_under_many_names,
        one_network_under_many_names, many_filters, many_mapping_layers, many_classes, long_numbers,
        long_decimal_integers,
        a_long_decimal_integer, a_long_binary_integer, escaped_text, a_long_name_of_a_class, marks,
        many_parts_of_an_archive,
    )
}  # fmt: skip
