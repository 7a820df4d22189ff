import os
import tempfile

# Kernels compiled by the tests are kept for the whole session and its subprocesses, and away from the user's own.
os.environ.setdefault("ADEMAMIX_CACHE", tempfile.mkdtemp(prefix="ademamix-tests-"))
