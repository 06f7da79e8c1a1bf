for (const clip of document.querySelectorAll(".clip")) {
  const slider = clip.querySelector("input");
  if (!slider) continue;
  const { worst, last, frames } = JSON.parse(clip.querySelector('script[type="application/json"]').textContent);
  const part = (role) => clip.querySelector(`[data-role="${role}"]`);
  slider.hidden = false;
  slider.addEventListener("input", () => {
    const shown = frames[slider.value];
    for (const picture of clip.querySelectorAll("img[data-role]")) {
      const role = picture.dataset.role;
      picture.src = shown[role];
      picture.alt = picture.alt.replace(/\d+$/, shown.frame);
    }
    part("frame").textContent = `Frame ${shown.frame}${shown.frame === worst ? ", the worst" : ""}`;
    if (shown.words) part("words").textContent = shown.words;
    slider.setAttribute("aria-valuetext", `frame ${shown.frame}`);
    for (const cursor of clip.querySelectorAll(".cursor")) cursor.style.left = `${(100 * shown.frame) / last}%`;
  });
}
