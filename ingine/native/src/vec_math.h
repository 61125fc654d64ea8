// Elementary functions that g++ vectorises, since they have no branch and call nothing.
#pragma once
#include "vec.h"

#include <cmath>

// e^x within 2 units of the last place; 0 where that is under float's normal range, infinite over it.
// Method and coefficients: S. Moshier, Cephes library, expf.
inline float exp_approx(float x) {
    constexpr float kLowest = -87.33654f, kHighest = 88.72283f, kLog2E = 1.44269504088896341f;
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kRound = 12582912.f;  // 1.5 * 2^23: added, the sum's last bits are the integer
    float clamped = x < kLowest ? kLowest : x > kHighest ? kHighest : x;
    float shifted = clamped * kLog2E + kRound;
    float n = shifted - kRound;
    float r = clamped - n * kLn2High - n * kLn2Low;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    uint32_t bits, exponent;
    std::memcpy(&bits, &p, 4);
    std::memcpy(&exponent, &shifted, 4);
    bits += exponent << 23;
    std::memcpy(&p, &bits, 4);
    return x < kLowest ? 0.f : x > kHighest ? INFINITY : p;
}
