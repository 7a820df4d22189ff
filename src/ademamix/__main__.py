"""`python -m ademamix`: the lab's command line."""

from ademamix.lab.cli import main

if __name__ == "__main__":
    main()
