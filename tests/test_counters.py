"""Nsight Compute's CSV, in both of its forms, and which instruction each kernel was launched for."""

import pytest
from stepbill.profiling.counters import Counted, CountersError, by_instruction, owners, parse

LONG = """\
==PROF== Connected to process 4242 (/opt/python3.12)
==PROF== Profiling "loop_fusion_3" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","4242","python3.12","127.0.0.1","loop_fusion_3","1","14","(128, 1, 1)","(1024, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_read.sum","Mbyte","33.56"
"0","4242","python3.12","127.0.0.1","loop_fusion_3","1","14","(128, 1, 1)","(1024, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_write.sum","Kbyte","1.02"
"1","4242","python3.12","127.0.0.1","void gemv<__nv_bfloat16, float>(int, T1 *)","1","14","(128, 1, 1)",\
"(4, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes_read.sum","byte","1,234,560"
"1","4242","python3.12","127.0.0.1","void gemv<__nv_bfloat16, float>(int, T1 *)","1","14","(128, 1, 1)",\
"(4, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes_write.sum","byte","0"
"""
WIDE = """\
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","dram__bytes_read.sum",\
"dram__bytes_write.sum"
"","","","","","","","Mbyte","byte"
"0","4242","python3.12","127.0.0.1","range","1","14","16,060.5","4,096"
"""


def test_one_line_a_metric():
    assert parse(LONG) == [
        Counted("loop_fusion_3", 33_560_000, 1_020),
        Counted("void gemv<__nv_bfloat16, float>(int, T1 *)", 1_234_560, 0),
    ]


def test_one_line_a_kernel():
    (found,) = parse(WIDE)
    assert found == Counted("range", 16_060_500_000, 4_096) and found.bytes == 16_060_504_096


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters",
            "may not read",
        ),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", "could not load"),
        ("==PROF== Connected to process 1\n==WARNING== No kernels were profiled.", "saw no kernel"),
        ("==ERROR== The application returned an error code (1).", "The application returned"),
        ("", "wrote no counters"),
        (LONG.replace("Mbyte", "furlong"), "unit is 'furlong'"),
        (LONG.replace("dram__bytes_write.sum", "dram__cycles.sum"), "dram__bytes_write.sum"),
    ],
)
def test_why_there_are_none(text, reason):
    with pytest.raises(CountersError, match=reason) as raised:
        parse(text)
    assert "\n" not in str(raised.value)


def test_kernels_that_instructions_share_are_told_by_their_order():
    """One kernel serves both layers; the library's is called otherwise by the two tools; one was not traced."""
    launches = [("fusion_1", "fusion.1"), ("nvjet", "dot.1"), ("fusion_1", "fusion.2"), ("copy_3", "copy.3")]
    counted = [
        Counted("fusion_1", 10, 1),
        Counted("void nvjet<float>", 100, 2),
        Counted("fusion_1", 20, 3),
        Counted("copy_3", 7, 7),
        Counted("memset", 5, 5),
    ]
    assert owners(counted, launches) == ["fusion.1", "dot.1", "fusion.2", "copy.3", None]
    assert by_instruction(counted, launches) == ({"fusion.1": 11, "dot.1": 102, "fusion.2": 23, "copy.3": 14}, 10)
