"`python -m orcd`: the command line, where its script is not on the path"
import sys
from orcd.serve.start import main

if __name__ == "__main__": sys.exit(main())
