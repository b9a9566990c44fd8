"""Settings of the machine: batches of whole rows, halved when memory runs out, and memory in bytes."""

import pytest

from nnprune.runtime import TOKENS_PER_BATCH, Runtime, available_host_bytes, peak_host_bytes, resident_host_bytes


@pytest.mark.parametrize(("batch_tokens", "rows"), [(64, 4), (63, 3), (16, 1), (1, 1), (None, TOKENS_PER_BATCH["cpu"] // 16)])
def test_a_batch_is_whole_rows_and_at_least_one(batch_tokens, rows):
    assert Runtime(device="cpu", batch_tokens=batch_tokens).rows_per_batch(16) == rows


def test_batches_are_halved_down_to_one_row(caplog):
    runtime, rows = Runtime(device="cpu", batch_tokens=5 * 16 + 7), []
    for _ in range(3):
        runtime.halve_batches(16)
        rows.append(runtime.rows_per_batch(16))
    assert rows == [2, 1, 1]
    assert len(caplog.messages) == 3
    assert caplog.messages[0].endswith("runtime.batch_tokens=32")


def test_memory_of_this_process_is_counted_in_bytes():
    assert 1e7 < resident_host_bytes() <= peak_host_bytes() < 1e12
    assert resident_host_bytes() < available_host_bytes()
