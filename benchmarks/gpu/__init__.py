"""The sections of ``benchmarks/gpu_once.py``: what of halfstep works on a GPU, and how fast, in fifteen minutes.

============== ========================================================================================================
file           subject
============== ========================================================================================================
plan           which sections there are, in which set, with how many seconds
running        a process for each section, its limit, what is written after it
section        what a section is given: where to write, how large to be, when to stop
records        the lines that sections write, and the document and the summary that follow from them
timing         step times by device events; waits and launches of a step
model, ways    a decoder; a training step of it by PyTorch alone or by halfstep
datasheet      what the maker promises, with sources
environment    versions, card, bandwidth of a copy, latency of a launch
numerics       the project's tests that are marked ``gpu``
waits          where a step makes the host wait for the device
gemm           matrix products of each format against the datasheet
optimizers     bytes that a step moves in a second, against a copy
training       tokens a second of GPTs of 124 million and of a billion parameters, eager and compiled
seven_billion  does fine-tuning a 7B model fit into 80 GB?
float8         products and layers in float8 at three sizes
comparison     ``halfstep compare`` on the built-in GPT
============== ========================================================================================================
"""
