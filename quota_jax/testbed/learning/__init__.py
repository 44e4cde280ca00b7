"""Training of the small models of the testbed: LLaVA-1.5 and Qwen2.5-VL from scratch, on the world.

`models` holds their sizes, `llava`, `qwen` and `decoder` the training forward passes, `data` what a
step draws, `step` the loss and the update, `trainer` the loop around it; `state` saves and resumes,
`processor`, `card` and `flops` are what an export and a plan need. `gpu_check` lowers the real
step for a GPU that is not there.
"""
