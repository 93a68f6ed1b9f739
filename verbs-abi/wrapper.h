/* The public verbs interface, as input of bindgen; verbs-abi/src/ffi.rs says how it is run. */
#include <infiniband/verbs.h>
