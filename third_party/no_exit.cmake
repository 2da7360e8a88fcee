# SPDX-License-Identifier: Apache-2.0
# Fails if a library can end the process: cmake -DNM=nm -DLIBRARY=x.so -P no_exit.cmake
#
# Where code of the host calls a __device__ function from within a template, nvcc (13.0) says
# nothing and compiles the function for the host as exit(1). The launch then ends the process
# without a word. Nothing else in the library may call exit, so its name tells.
execute_process(COMMAND "${NM}" -D --undefined-only "${LIBRARY}"
                OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
if(symbols MATCHES " U exit(@|\n|$)")
  message(FATAL_ERROR
    "${LIBRARY} calls exit: a launch in csrc/launch/*.cu calls a VSA_DEVICE function on the host, "
    "which nvcc compiles to exit(1); mark the function VSA_HD")
endif()
