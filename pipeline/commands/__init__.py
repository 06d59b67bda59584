"""The commands of `train-export`, a module a group: options in, results out. Only these print.

Exit status: 0 done; 1 refused, with one sentence that says why; 2 wrong options; 75 training was
stopped by SIGTERM and goes on when the same command is given again; 130 stopped with Ctrl-C, 143 by
SIGTERM elsewhere.
"""
