from tests.benchmarks.gpu_profile import Span, kind_of, summarize


def test_time_without_kernels_is_found_also_when_streams_overlap():
    spans = [
        Span("nvjet_tst", 0, 1000),
        Span("memcpy", 500, 3000),  # beside the first one, longer
        Span("_chunk_scan_fwd", 3500, 4000),
        Span("memset", 3600, 3700),  # within
        Span("rms_norm", 6000, 7000),
    ]
    found = summarize(spans[::-1])
    assert (found["span_ms"], found["busy_ms"], found["kernels"]) == (7.0, 4.5, 5)
    assert found["longest_gaps"] == [(2.0, "_chunk_scan_fwd", "rms_norm"), (0.5, "memcpy", "_chunk_scan_fwd")]
    assert found["kinds_ms"] == {
        "element-wise": 2.6,
        "bf16 products": 1.0,
        "norms and gates": 1.0,
        "scan": 0.5,
    }


def test_what_no_pattern_names_is_other():
    assert kind_of("a_kernel_of_the_future") == "other"


def test_kernels_of_our_own_and_of_several_gpus_have_their_kinds():
    kinds = {
        "_walk": "scan",
        "_pairs": "scan",
        "_scan": "scan",
        "_columns": "scan",
        "fp8_product": "FP8 products",
        "_backward": "norms and gates",
        "_quantise": "casts to FP8",
        "void transformer_engine::block_scaled_1d_cast_transpose_kernel<true, float, __nv_bfloat16, __nv_fp8_e4m3>": "casts to FP8",
        "nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_coopA_algo2_Avec128_Bvec128_TNT": "FP8 products",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": "communication",
        "void at::native::(anonymous namespace)::split_with_sizes_copy_out_contiguous_no_cast_kernel": (
            "gathered and divided weights"
        ),
        "void at::native::(anonymous namespace)::chunk_cat_cuda_kernel<float, float>": "gathered and divided weights",
    }
    assert {name: kind_of(name) for name in kinds} == kinds
