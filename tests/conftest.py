"""One thread per test process: two processes beat two threads."""

import torch

torch.set_num_threads(1)
