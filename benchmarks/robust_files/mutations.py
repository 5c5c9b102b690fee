"""What happens to files: damage of bytes that any may have, and malice that fits the kind of file."""

import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

Generator = np.random.Generator
Mutation = Callable[[bytes, Generator], bytes]
NUMBERS = (
    b"-1", b"1e400", b"1e999999", b"999999999999999999999", b"1" * 400, b"1" * 6000, b"nan", b"-0", b"0x10", b"1_0", b"1:30",
    b"2e9", b"4294967296", b"1000000000", b"0",
)  # fmt: skip
TEXTS = (
    b"null", b"true", b"[]", b"{}", b'""', b"\xff\xfe", b"\x00", b"- - - -", b"2001-99-99", b"!!binary x", b"!!timestamp x",
    b"!!python/object/apply:os.system [id]", b"&a [*a]", b"*b", b"<<: x", b"\t", b"\r", b"\x1b[31m", b'"', b"'", b"%", b"@",
)  # fmt: skip
STARTS = (
    b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"PAR1", b"ARROW1\0\0", b"\x93NUMPY\x01\0", b"\x80\x04\x95", b"\xef\xbb\xbf",
    b"\x1f\x8b\x08",
)  # fmt: skip


def _place(content: bytes, rng: Generator) -> int:
    """Half of all places are at an end, where formats have their tables."""
    n = max(1, len(content))
    span = min(n, 300)
    return int(rng.choice([rng.integers(n), rng.integers(span), n - 1 - rng.integers(span)], p=[0.5, 0.25, 0.25]))


def flip_bits(content: bytes, rng: Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(int(rng.choice([1, 2, 8, 64]))):
        if changed:
            changed[_place(content, rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def set_bytes(content: bytes, rng: Generator) -> bytes:
    at, n = _place(content, rng), int(rng.choice([1, 2, 4, 8]))
    value = rng.choice([0, 0x7F, 0x80, 0xFF])
    return content[:at] + bytes([value] * n) + content[at + n :]


def truncate(content: bytes, rng: Generator) -> bytes:
    return content[: _place(content, rng)]


def cut_out(content: bytes, rng: Generator) -> bytes:
    at = _place(content, rng)
    return content[:at] + content[at + int(rng.integers(1, 64)) :]


def double(content: bytes, rng: Generator) -> bytes:
    if rng.random() < 0.2:
        return content + content
    at, n = _place(content, rng), int(rng.integers(1, 512))
    return content[: at + n] + content[at : at + n] + content[at + n :]


def zero_block(content: bytes, rng: Generator) -> bytes:
    at, n = _place(content, rng), int(rng.choice([8, 64, 512, 4096]))
    return content[:at] + bytes(min(n, len(content) - at)) + content[at + n :]


def swap_blocks(content: bytes, rng: Generator) -> bytes:
    n = int(rng.choice([4, 16, 128]))
    first, second = sorted((_place(content, rng), _place(content, rng)))
    if second < first + n:
        return content
    return (
        content[:first]
        + content[second : second + n]
        + content[first + n : second]
        + content[first : first + n]
        + content[second + n :]
    )


def insert_noise(content: bytes, rng: Generator) -> bytes:
    at = _place(content, rng)
    return content[:at] + rng.bytes(int(rng.integers(1, 100))) + content[at:]


def other_kind(content: bytes, rng: Generator) -> bytes:
    starts = (
        b"",
        b"PK\x03\x04",
        b"\x89HDF\r\n\x1a\n",
        b"PAR1",
        b"ARROW1\0\0",
        b"\x93NUMPY\x01\0",
        b"\x80\x04\x95",
        b"\xef\xbb\xbf",
        b"\x1f\x8b\x08",
    )
    start = starts[int(rng.integers(len(starts)))]
    return start + (content if rng.random() < 0.5 else content[len(start) :])


BYTES: tuple[Mutation, ...] = (
    flip_bits,
    set_bytes,
    truncate,
    cut_out,
    double,
    zero_block,
    swap_blocks,
    insert_noise,
    other_kind,
)


def change_number(content: bytes, rng: Generator) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    if not found:
        return flip_bits(content, rng)
    one = found[int(rng.integers(len(found)))]
    return content[: one.start()] + NUMBERS[int(rng.integers(len(NUMBERS)))] + content[one.end() :]


def change_value(content: bytes, rng: Generator) -> bytes:
    """Of a key, or of a cell of a table."""
    found = list(re.finditer(rb"(?<=[:=,])\s*[^\s,:\[\]{}]+", content))
    if not found:
        return flip_bits(content, rng)
    one = found[int(rng.integers(len(found)))]
    return content[: one.start()] + b" " + TEXTS[int(rng.integers(len(TEXTS)))] + content[one.end() :]


def insert_text(content: bytes, rng: Generator) -> bytes:
    at = _place(content, rng)
    return content[:at] + TEXTS[int(rng.integers(len(TEXTS)))] + content[at:]


def nest(content: bytes, rng: Generator) -> bytes:
    sign = (b"[", b"{", b'{"a":', b"- ", b"[[")[int(rng.integers(5))]
    deep = sign * int(rng.choice([60, 1000, 100_000]))
    found = list(re.finditer(rb"(?<=[:=])\s*\S+", content))
    at = found[int(rng.integers(len(found)))].start() if found else len(content)
    return (
        content[:at] + b" " + deep + (b"]" * len(deep) if rng.random() < 0.5 and b"[" in sign else b"") + b"\n" + content[at:]
    )


def change_lines(content: bytes, rng: Generator) -> bytes:
    lines = content.splitlines(keepends=True) or [b"\n"]
    first, second = (int(rng.integers(len(lines))) for _ in range(2))
    match int(rng.integers(4)):
        case 0:
            lines.insert(first, lines[second])
        case 1:
            del lines[first]
        case 2:
            lines[first], lines[second] = lines[second], lines[first]
        case _:
            lines[first] = lines[first].replace(b":", b"").replace(b",", b";", 1)
    return b"".join(lines)


def laugh(content: bytes, rng: Generator) -> bytes:
    """Aliases of YAML that stand for a billion values."""
    lines = [b"l0: &l0 [x, x]"] + [b"l%d: &l%d [%s]" % (i, i, b", ".join([b"*l%d" % (i - 1)] * 9)) for i in range(1, 10)]
    return (
        b"\n".join(lines)
        + b"\n"
        + (content if rng.random() < 0.5 else content.replace(b"observations:", b"observations: *l9 #"))
    )


TEXT: tuple[Mutation, ...] = (change_number, change_value, insert_text, nest, change_lines, laugh)


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def change_members(content: bytes, rng: Generator) -> bytes:
    """Members of a zip file that do not fit: twice, missing, renamed, exchanged, damaged with a right checksum, ..."""
    members = list(_members(content).items())
    at, other = (int(rng.integers(len(members))) for _ in range(2))
    name, one = members[at]
    match int(rng.integers(8)):
        case 0:
            members.append((name, members[other][1]))
        case 1:
            del members[at]
        case 2:
            members[at] = (name.removesuffix(".npy"), one)
        case 3:
            members[at] = (name, members[other][1])
        case 4:
            members[at] = (name, BYTES[int(rng.integers(len(BYTES)))](one, rng))
        case 5:
            members[at] = (name, change_number(one[:128], rng) + one[128:])
        case 6:
            members[at] = ("../../" + name, one)
        case _:
            members[at] = (name, rng.choice([b"", b"[1, 2]", bytes(10), b"\x80\x04."]))
    return _zip(members)


def swell(content: bytes, rng: Generator) -> bytes:
    """Members that unpack to gigabytes, or say so."""
    members = _members(content)
    name = list(members)[int(rng.integers(len(members)))]
    header = io.BytesIO()
    shape = [(2**28,), (2**40, 4), (10, 2**30), (0, 2**50), (2**63, 2)][int(rng.integers(5))]
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    members[name] = header.getvalue() + bytes(2**20)
    return _zip(list(members.items()), zipfile.ZIP_DEFLATED)


def bomb(content: bytes, rng: Generator) -> bytes:
    """A pickle in place of an array."""
    members = _members(content)
    name = list(members)[int(rng.integers(len(members)))]
    stream = io.BytesIO()
    np.save(stream, np.array([os.system, {"x": 1}], dtype=object))
    members[name] = stream.getvalue()
    return _zip(list(members.items()))


ZIP: tuple[Mutation, ...] = (change_members, change_members, swell, bomb)


def change_hdf5(content: bytes, rng: Generator) -> bytes:
    """Arrays of HDF5 that lie elsewhere, are of another kind, or unpack to gigabytes."""
    stream = io.BytesIO(content)
    with h5py.File(stream, "r+") as file:
        arrays: list[str] = []
        file.visititems(lambda name, item: arrays.append(name) if isinstance(item, h5py.Dataset) else None)
        name = arrays[int(rng.integers(len(arrays)))]
        values = file[name][()]
        if rng.random() < 0.15 and "/" in name:
            name = name.rpartition("/")[0]
        del file[name]
        match int(rng.integers(14)):
            case 0:
                file[name] = h5py.ExternalLink("/etc/hostname", "/x")
            case 1:
                file[name] = h5py.SoftLink("/" + name)
            case 2:
                file[name] = h5py.SoftLink("/nowhere")
            case 3:
                file.create_dataset(name, (64,), np.uint8, external=[("/etc/passwd", 0, 64)])
            case 4:
                layout = h5py.VirtualLayout(values.shape, values.dtype)
                layout[...] = h5py.VirtualSource("other.hdf5", "x", values.shape)
                file.create_virtual_dataset(name, layout)
            case 5:
                file.create_dataset(name, (2**40, 3), np.float32, chunks=(2**16, 3), compression="gzip")
            case 6:
                file.create_dataset(name, (2**29,), np.float64, chunks=(2**16,), compression="gzip")
            case 7:
                file[name] = h5py.Empty("f4")
            case 8:
                file[name] = ["text"] * len(values)
            case 9:
                file.create_dataset(name, data=np.zeros(len(values), [("a", "f4"), ("b", "i8")]))
            case 10:
                file[name] = np.dtype("f8")
            case 11:
                file.create_group(name)
            case 12:
                file.create_dataset(name, (len(values),), h5py.ref_dtype)
            case _:
                file[name] = values[: len(values) // 2] if values.ndim else values
    return stream.getvalue()


def change_arrow(content: bytes, rng: Generator) -> bytes:
    """Columns of Parquet or Arrow files of other types, or with an index that pandas needs."""
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet

    is_parquet = content.startswith(b"PAR1")
    table = parquet.read_table(io.BytesIO(content)) if is_parquet else pa.ipc.open_file(io.BytesIO(content)).read_all()
    n, at = len(table), int(rng.integers(table.num_columns))
    name = table.column_names[at]
    made = [
        lambda: pa.array([[1.0, 2.0]] * n), lambda: pa.array([[1.0]] * (n - 1) + [None]), lambda: pa.array([[[1.0]]] * n),
        lambda: pa.nulls(n), lambda: pa.array(["x"] * n), lambda: pa.array([b"\xff"] * n), lambda: pa.array([{"a": 1}] * n),
        lambda: pa.array([2**63] * n, pa.uint64()), lambda: pa.array(pd.date_range("2020", periods=n)),
        lambda: pa.array([1.5] * n).cast(pa.decimal128(38, 10)), lambda: pa.array([True] * n),
        lambda: pa.array(["a"] * n).dictionary_encode(), lambda: pa.array([np.nan] * n), lambda: pa.array([1e39] * n),
        lambda: pa.array([[float(i)] * (i % 3) for i in range(n)]), lambda: pa.array([np.float16(1)] * n),
        lambda: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())), lambda: pa.array([5] * n, pa.duration("s")),
    ]  # fmt: skip
    stream = io.BytesIO()
    if is_parquet and rng.random() < 0.3:
        frame = table.to_pandas().set_index([name] if rng.random() < 0.7 else table.column_names[:2])
        frame.to_parquet(stream)
        return stream.getvalue()
    match int(rng.integers(5)):
        case 0:
            table = table.remove_column(at)
        case 1:
            table = table.append_column(name, table[name])
        case 2:
            table = table.slice(0, int(rng.integers(n)))
        case _:
            table = table.set_column(at, name, made[int(rng.integers(len(made)))]())
    if is_parquet:
        parquet.write_table(table, stream)
    else:
        with pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)
    return stream.getvalue()


def change_json(content: bytes, rng: Generator) -> bytes:
    """One value of a JSON object anywhere in it, or in the JSON within its texts, is another one or missing."""
    values = [None, -1, 10**18, 10**400, 1e308, "", "x", [], {}, True, [[1]], {"a": None}, 2**31, "Infinity", [float("nan")]]
    outer = json.loads(content)

    def places(value: object, path: tuple[object, ...]) -> list[tuple[object, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [path, *(place for key, each in inner for place in places(each, (*path, key)))]

    found = places(outer, ())[1:]
    path = found[int(rng.integers(len(found)))]
    holder = outer
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    if isinstance(old, str) and old.startswith("{") and rng.random() < 0.8:
        holder[path[-1]] = change_json(old.encode(), rng).decode()
    elif rng.random() < 0.2:
        del holder[path[-1]]
    else:
        holder[path[-1]] = values[int(rng.integers(len(values)))]
    return json.dumps(outer).encode()


def mutations_for(path: Path) -> tuple[Mutation, ...]:
    """Those of bytes, and those that fit the kind of the file."""
    fitting: dict[str, tuple[Mutation, ...]] = {
        ".npz": ZIP, ".zip": ZIP, ".pt": (change_members,), ".hdf5": (change_hdf5,) * 5, ".parquet": (change_arrow,) * 5,
        ".arrow": (change_arrow,) * 5, ".json": (*TEXT, change_json, change_json, change_json), ".gz": (),
    }  # fmt: skip
    return (*BYTES, *fitting.get(path.suffix, TEXT))


def replace_file(path: Path, rng: Generator) -> str:
    """Put something else in the file's place that has its name."""
    path.unlink()
    kind = ("named pipe", "folder", "device", "dangling link", "link to itself", "nothing")[int(rng.integers(6))]
    match kind:
        case "named pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "dangling link":
            path.symlink_to("nowhere")
        case "link to itself":
            path.symlink_to(path.name)
        case _:
            pass
    return kind
