// One translation unit: the whole library compiles in a few seconds, and nothing is exported but
// the functions of kernels.h.
#include "attention.cpp"
#include "coded.cpp"
#include "layers.cpp"
#include "library.cpp"
#include "limits.cpp"
#include "linear.cpp"
#include "rows.cpp"
