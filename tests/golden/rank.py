"""One rank of ``longspan ARGUMENTS`` in a folder: FOLDER ARGUMENT ..."""

import os
import sys

from longspan.launch.cli import main

folder, *arguments = sys.argv[1:]
os.chdir(folder)
main(arguments)
