// Elementary functions without branches and calls, so that g++ vectorises them.
#pragma once
#include "vec.h"

inline float power_of_two(int32_t exponent) {
    uint32_t bits = uint32_t(exponent + 127) << 23;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// Returns e^x within 2 units of the last place; 0, infinity and NaN where exact arithmetic gives them.
// Method and coefficients: S. Moshier, Cephes library, expf.
inline float exp_approx(float x) {
    constexpr float kLowest = -104, kHighest = 89, kLog2E = 1.44269504088896341f;
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kRound = 12582912;  // 1.5 * 2^23: the last bits of the sum are the integer
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
    p = p * r * r + r + 1;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits -= 0x4b400000;  // n as an integer
    // In two factors, since 2^n may be out of range where the product is not.
    return p * power_of_two(bits >> 1) * power_of_two(bits - (bits >> 1));
}
