"""Settings every test runs under."""

import torch

# The models are tiny: a second thread costs more in waiting than it saves, several times over on a busy machine.
torch.set_num_threads(1)
