# SPDX-License-Identifier: Apache-2.0
"""setup.py with whatever setuptools there is: those before 69.0.3 have no setuptools.modified.

python setup_here.py BUILD-ARGUMENTS...     from the folder of setup.py
"""

import runpy
import sys
import types

import setuptools

try:
    import setuptools.modified
except ImportError:
    from setuptools._distutils.dep_util import newer_group

    setuptools.modified = types.ModuleType("setuptools.modified")
    setuptools.modified.newer_group = newer_group
    sys.modules["setuptools.modified"] = setuptools.modified

sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
