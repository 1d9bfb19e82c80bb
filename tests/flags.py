"""How tests compile, which takes most of their time: models then run for milliseconds."""

import importlib.metadata

DEVICES = "--xla_force_host_platform_device_count=8"
# One thread a worker: arrays of tests are small, and workers that each want all cores wait for one another.
THREADS = "--xla_cpu_multi_thread_eigen=false"
# A fifth of the time of compilation is optimising.
QUICK = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):
    # Its older way to compile what is fused takes two thirds of the time; later versions have only the newer one, and
    # end at a flag that they do not know.
    QUICK += " --xla_cpu_use_fusion_emitters=false"
    # Programs are small: to cut one into parts that are compiled side by side takes longer than to compile it.
    QUICK += " --xla_cpu_parallel_codegen_split_count=1"

# Files that count compiled programs, or change the code that is compiled: they share no programs with other files.
ALONE = {
    *("test_adaptive", "test_block_costs", "test_exactness", "test_experts", "test_gpu", "test_kangaroo", "test_loop"),
    *("test_lossy", "test_mesh", "test_models", "test_parts_meter", "test_prefill", "test_quantised", "test_recipes"),
    *("test_skip_layers", "test_slots"),
}
