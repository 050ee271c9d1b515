for (const plot of document.querySelectorAll('.plot')) {
  const last = Number(plot.dataset.last), tip = plot.querySelector('.tip'), cursor = plot.querySelector('.cursor');
  const show = v => Math.abs(v) >= 1e-3 || v === 0 ? v.toLocaleString('en', {maximumSignificantDigits: 5}) : v.toExponential(3);
  let lines;
  plot.onpointermove = event => {
    lines ??= [...plot.querySelectorAll('path[data-label]')].map(path => {
      const numbers = path.getAttribute('d').match(/-?[\d.]+(e[-+]?\d+)?/g).map(Number), area = path.matches('.area');
      const points = numbers.flatMap((x, i) => i % 2 ? [] : [[x, numbers[i + 1]]]);
      return {label: path.dataset.label, color: path.getAttribute('style'), area, points: area ? points.slice(1, -1) : points};
    });
    const box = plot.getBoundingClientRect(), at = last * (event.clientX - box.left) / box.width;
    const near = lines.map(line => line.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const step = near.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)[0];
    const head = document.createElement('b');
    head.textContent = 'step ' + Math.round(step).toLocaleString('en');
    tip.replaceChildren(head, ...lines.flatMap(({label, color, area}, i) => {
      if (Math.abs(near[i][0] - step) > last / 100) return [];
      const row = document.createElement('div'), value = near[i][1] - (area && lines[i + 1] ? near[i + 1][1] : 0);
      row.style = color;
      row.textContent = label + '  ' + show('log' in plot.dataset ? 10 ** value : value);
      return [row];
    }));
    const share = step / last;
    cursor.style.left = share * 100 + '%';
    tip.style.left = share < .5 ? `calc(${share * 100}% + 10px)` : 'auto';
    tip.style.right = share < .5 ? 'auto' : `calc(${100 - share * 100}% + 10px)`;
    tip.style.display = cursor.style.display = 'block';
  };
  plot.onpointerleave = () => tip.style.display = cursor.style.display = 'none';
}
