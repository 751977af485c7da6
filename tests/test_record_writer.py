import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.proto import tf_example_pb2

from cxa_jax.data.record_writer import RepeatableWriter

NAMES = [f"field{i}" for i in range(12)]


def _example(order: np.ndarray, row: int) -> bytes:
    """Serialize an example by hand, fields in the given order: Example.features (1) holds map entries (1)."""
    body = b""
    for i in order:
        single = tf_example_pb2.Example()
        single.features.feature[NAMES[i]].int64_list.value.append(100 * row + int(i))
        body += single.features.SerializeToString()
    return b"\x0a" + bytes([len(body) & 127 | 128, len(body) >> 7]) + body


def test_files_do_not_depend_on_the_order_of_fields(tmp_path):
    rng = np.random.default_rng(0)
    writer = RepeatableWriter(FileFormat.ARRAY_RECORD)
    written, given = [], []
    for run in range(2):
        records = [_example(rng.permutation(12), row) for row in range(5)]
        path = tmp_path / f"{run}.array_record"
        writer.write(path, ((str(row), record) for row, record in enumerate(records)))
        written.append(path.read_bytes())
        given.append(records)
        source = ArrayRecordDataSource([str(path)])
        for row in range(5):
            fields = tf_example_pb2.Example.FromString(source[row]).features.feature
            assert {name: fields[name].int64_list.value[0] for name in fields} == {
                name: 100 * row + i for i, name in enumerate(NAMES)
            }
    assert given[0] != given[1]
    assert written[0] == written[1]
