"""What a test of tests/gpu leaves in its junit XML."""

from __future__ import annotations

from overlay.testing.junit import Case

ABOUT = {
    "vllm": "1.0",
    "torch": "2.6.0",
    "device": "NVIDIA Made-up",
    "capability": "7.5",
    "engine": "V0",
    "backend": "vllm.attention.backends.xformers.XFormersImpl",
    "dtype": "float16",
    "kv_cache_dtype": "auto",
    "compilation": "level 0, graphs True",
    "prefix_caching": "False",
}
MEASURES = {"within_chunk": "0.195", "past_chunk": "0.063", "agreement": "319 of 320"}


def gpu_case(name: str = "test_v0[xformers-graphs]", outcome: str = "passed") -> Case:
    return Case(f"gpu.test_engine::{name}", outcome, "", "fail", "", MEASURES, ABOUT)


def xml(*cases: Case, timestamp: str = "2026-11-28T12:00:00.123456+00:00") -> str:
    """The file that pytest would have written of `cases`."""
    return (
        f'<testsuites><testsuite timestamp="{timestamp}">'
        + "".join(_testcase(case) for case in cases)
        + "</testsuite></testsuites>"
    )


def _testcase(case: Case) -> str:
    classname, _, name = case.name.partition("::")
    properties = {**case.measures, **{f"about_{key}": value for key, value in case.about.items()}}
    told = "".join(f'<property name="{key}" value="{value}"/>' for key, value in properties.items())
    result = "" if case.outcome == "passed" else '<failure message="wrong answers">x</failure>'
    return (
        f'<testcase classname="{classname}" name="{name}"><properties>{told}</properties>'
        f"{result}</testcase>"
    )
