"""Numbers that the kernels and the reference must agree on."""
import math

LOG2E = math.log2(math.e)  # scores are taken in log2 units, in which exp is exp2
INT8_MAX = 127.0
FLOAT16_LIMIT = 2.0 ** 8  # a block of V with values beyond this is divided by a power of two, see prepare_keys.py
INT8_LIMIT = 4.0  # a block of V with values beyond this, the largest sampled being 1, has INT8 scales by channel
ROW_GROUP = 16  # rows of one tensor-core instruction: the finest group of rows that can skip together
# A channel of V whose sampled values hardly vary is taken to vary by this share of the one that varies most, so that a
# value that the sample missed costs the other channels of its block no precision.
LEAST_SPREAD = 2.0 ** -10
HIDDEN = -1e4  # log2 units; a key whose bias is as far below the largest of its row counts as padding
