"""``python -m sb3_offline_ft.zoo.enjoy``: rl_zoo3's enjoy with our algorithms, or with a policy in ONNX's format."""

import sys

import sb3_offline_ft.zoo


def main() -> None:
    """Run ``rl_zoo3.enjoy`` with its own command line, ours being among the algorithms; with ``--onnx``, its loop alone."""
    options = {argument.partition("=")[0] for argument in sys.argv[1:]}
    if "--onnx" in options:
        from sb3_offline_ft.zoo.enjoy_onnx import enjoy_onnx

        return enjoy_onnx(sys.argv[1:])
    if options & {"-h", "--help"}:
        print("With --onnx FILE a policy in ONNX's format acts: --onnx FILE --help shows its options. Without it:\n")
    sb3_offline_ft.zoo.register()
    from rl_zoo3.enjoy import enjoy

    enjoy()


if __name__ == "__main__":
    main()
