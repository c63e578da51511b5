"""Where the editor lists the nodes of the pack, and the words that find every one of them."""

CATEGORY = "model/patch/SpargeAttn"
SEARCH_ALIASES = ("sparge", "SpargeAttention", "sage", "sage attention", "sparse attention", "block sparse",
                  "faster attention", "optimize attention", "speed up", "accelerate", "加速", "稀疏注意力")
