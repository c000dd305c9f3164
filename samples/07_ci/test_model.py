"""The gate as a part of a team's own tests: needs depthcut and pytest, no workflow."""


def test_the_pruned_model_is_faster_and_not_much_worse(depthcut):
    comparison = depthcut.compare("build/baseline", "build/candidate", prefill=(128,))
    comparison.assert_limits(
        min_speedup=1.0, max_perplexity_increase="10%", max_memory_increase="0%"
    )
