import os
import tempfile

# Kernels compiled by the tests are kept for the whole session and its subprocesses, and away from the user's own.
if "ADEMAMIX_CACHE" not in os.environ:
    kernels = tempfile.TemporaryDirectory(prefix="ademamix-tests-", ignore_cleanup_errors=True)
    os.environ["ADEMAMIX_CACHE"] = kernels.name
