"""The rules of the lint, one function for each code.

::

    setting     what is linted: modules, optimizers, policy; names of parameters
    keeping     how an optimizer keeps its parameters and its state: masters, compensation, 16-bit moments
    asking      what an optimizer of PyTorch does, found by asking it: its step, run on a tensor of our own
    parameters  HS304 HS306 HS309 HS505: the weights
    state       HS305 HS307 HS308 HS311: moments, betas, eps, compensation
    buffers     HS310 HS409: running statistics, averages, positions, frequencies
    setup       HS207 HS208 HS410 HS501 HS502 HS503 HS504: scaler, autocast, device
    reduction   HS508: gradients summed over ranks
"""
