"""For all tests: signals as a terminal has them."""

import signal

# Started in the background or under nohup, this process ignores Ctrl-C, and so would every process that a test starts
# and interrupts; a handler here means the default there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
