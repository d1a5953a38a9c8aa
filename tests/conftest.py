import torch

# On maps as small as the tests', threads mostly wait for one another: ten times slower beside another busy process.
torch.set_num_threads(1)
