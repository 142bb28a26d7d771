"""Results come in order, whatever the number of threads."""

import torch

from eigencache.codec.eigen.threads import parallel


def test_results_are_in_order() -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert parallel(lambda x: x * x, range(50)) == [x * x for x in range(50)]
            assert parallel(lambda x: x, []) == []
    finally:
        torch.set_num_threads(threads)
