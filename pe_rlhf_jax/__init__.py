"""Parameter-efficient RLHF in JAX."""

import os

# transformers says at import that it found no PyTorch; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
