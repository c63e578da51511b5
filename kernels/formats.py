"""Numbers that the kernels and the reference must agree on."""
import math

LOG2E = math.log2(math.e)  # scores are taken in log2 units, in which exp is exp2
INT8_MAX = 127.0
FP8_MAX = 448.0  # largest finite float8_e4m3fn
ROW_GROUP = 16  # rows of one tensor-core instruction: the finest group of rows that can skip together
# A channel of V whose sampled values hardly vary is taken to vary by this share of the one that varies most, so that a
# value that the sample missed costs the other channels of its block no precision. Both formats of V have the range.
LEAST_SPREAD = 2.0 ** -10
HIDDEN = -1e4  # log2 units; a key whose bias is as far below the largest of its row counts as padding
