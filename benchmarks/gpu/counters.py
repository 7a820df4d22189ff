"""Steps for `ncu` to look at: its counters say what a kernel waits for."""

from gpu.sweep import KINDS, optimizer


def main() -> None:
    for kind in KINDS:
        step = optimizer(kind, [(8192, 8192)]).step
        for _ in range(2):
            step()


if __name__ == "__main__":
    main()
