"""main-wds.py, each rank of which stops itself with SIGSTOP after each epoch, until it gets SIGCONT.

A script, not a function of instruments.py: forked runs share memory with the fork server, so theirs can't be measured.
"""

import os
import signal
import sys

from commands import ROOT, load

main_wds = load("main-wds.py")
validate = main_wds.validate


def validate_and_stop(*args):
    accuracy = validate(*args)
    os.kill(os.getpid(), signal.SIGSTOP)
    return accuracy


if __name__ == "__main__":
    main_wds.validate = validate_and_stop
    sys.argv[0] = str(ROOT / "main-wds.py")
    main_wds.main()
