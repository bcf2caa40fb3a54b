// Stands for CuPy's header of the same name: complex<T> with the operators of std::complex.
#pragma once
#include <complex>
using std::complex;
